"""A process under watch, for tests of the watchdog's parts."""

import subprocess
import sys

import pytest

from dstrain.health.heartbeat import Heartbeat
from dstrain.health.sidecar_settings import SidecarSettings
from dstrain.health.watchdog import WatchdogConfig
from dstrain.health.watched_process import identify

RANK = "import signal, sys; signal.signal(signal.SIGRTMIN + 5, signal.SIG_IGN); print(flush=True); sys.stdin.readline()"


@pytest.fixture
def rank():
    """A process that has nothing to say when it is asked for stacks, and never makes progress by itself."""
    process = subprocess.Popen([sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def heartbeat():
    beat = Heartbeat()
    yield beat
    beat.close()


@pytest.fixture
def settings(tmp_path, rank, heartbeat):
    config = WatchdogConfig(min_step_budget_s=0.1, first_step_s=0.1, poll_s=0.02, publish_s=0.05, report_s=2.0)
    timing = {name: getattr(config, name) for name in SidecarSettings.TIMING}
    return SidecarSettings(
        run_folder=str(tmp_path), rank=0, world_size=1, pid=rank.pid, started=identify(rank.pid).started,
        descriptor=heartbeat.descriptor, job="j", first=1, budgets=config.budgets(), **timing,
    )  # fmt: skip
