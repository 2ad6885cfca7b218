"""What all fault tests share: processes that hear signals, and one zygote, so that imports are paid once."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.storage_trials import Bench, fast_bench
from tests.support.zygote import Zygote


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard() -> None:
    """A shell in the background, and nohup, start this process with signals ignored, which its children would inherit."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("zygote") / "zygote.log") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """Scratch for trials of the save protocol."""
    with fast_bench() as made:
        yield made
