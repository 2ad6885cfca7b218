"""What the unit tests of several rooms share: a world of one, opened once for the whole test process."""

from __future__ import annotations

import gc
import os

import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.world import World, free_port


@pytest.fixture(scope="session")
def _processes() -> ControlPlane:
    from dstrain.train.engine import start_processes

    gc.freeze()  # DeepSpeed collects six times for each bf16 engine; what is imported by now need not be walked again
    before = dict(os.environ)
    try:
        return start_processes(World(master_port=free_port()), device="cpu", timeout_s=60)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def control(_processes: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> ControlPlane:
    """The process group and the variables that DeepSpeed wants, and agreements of one rank with itself."""
    variables: dict[str, str] = {}
    _processes.world.export(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return _processes
