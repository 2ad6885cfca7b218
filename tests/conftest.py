"""What every test stands on: a quiet, offline, single-threaded process and repeatable property tests.

The environment is set here, before any test imports torch, DeepSpeed or a Hugging Face library, and child processes
inherit it. `--import-mode=importlib` is in pyproject.toml: test folders need no `__init__.py`, equal file names are fine.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share few cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rayon threads do not survive the forks of test workers
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a defect
os.environ["HF_DATASETS_OFFLINE"] = "1"
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU driver: skip DeepSpeed's detection and its warning

# The same examples on every machine, and no deadline: a loaded two-core runner is not a defect.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_UMASK = 0o022
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _no_inherited_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test never believes to be a rank of the job that happens to run pytest."""
    for name in _RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """What a command run in this process sets for the whole of it (umask, signal handlers) ends with its test.

    Fixtures of a module run commands as well, before this: so the umask is set, not kept.
    """
    os.umask(_UMASK)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    os.umask(_UMASK)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
