"""The keeper: passes the code on, endures signals, and leaves nothing when launcher or supervisor dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.launcher.process_group import ProcessGroup
from dstrain.launcher.starters import TOKEN

_SAVES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "saved").touch(), sys.exit(75)))
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""
_CARELESS = """
import os, signal, subprocess, sys, time, pathlib
subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], env={**os.environ, "RANK": "0"}, start_new_session=True)
while not pathlib.Path(sys.argv[1], "ready").exists():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _keep(token: str, *command: str, grace_s: float = 60) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dstrain.launcher.keeper", str(grace_s), *command],
        env={**os.environ, TOKEN: token}, stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _end(keeper: subprocess.Popen[bytes]) -> int:
    """Wait without closing the pipe, as `Popen.wait` does and `communicate` does not."""
    try:
        return keeper.wait(60)
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "expected"), [("import sys; sys.exit(78)", 78), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_launcher_s_code_is_passed_on(code: str, expected: int) -> None:
    assert _end(_keep(uuid.uuid4().hex, sys.executable, "-c", code)) == expected


def test_a_command_that_does_not_exist_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert _end(_keep(uuid.uuid4().hex, "no-such-launcher")) == 127
    assert "no-such-launcher: cannot be started" in capfd.readouterr().err


def test_ranks_of_a_launcher_that_dies_save_and_leave(tmp_path: Path) -> None:
    token = uuid.uuid4().hex
    assert _end(_keep(token, sys.executable, "-c", _CARELESS, str(tmp_path), _SAVES)) == 137
    assert (tmp_path / "saved").exists()
    assert ProcessGroup(token).members() == []


def test_a_launcher_that_must_be_killed_is_never_reported_as_complete(tmp_path: Path) -> None:
    ignores = "import pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN); pathlib.Path(sys.argv[1], 'ready').touch()"
    keeper = _keep(uuid.uuid4().hex, sys.executable, "-c", ignores + "; time.sleep(600)", str(tmp_path), grace_s=0.1)
    _until((tmp_path / "ready").exists)
    assert keeper.stdin is not None
    keeper.stdin.close()
    assert keeper.wait(60) == 137


def test_a_closed_pipe_means_that_the_supervisor_is_gone_and_signals_mean_nothing(tmp_path: Path) -> None:
    token = uuid.uuid4().hex
    keeper = _keep(token, sys.executable, "-c", _SAVES, str(tmp_path))
    _until((tmp_path / "ready").exists)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        keeper.send_signal(number)
    assert keeper.poll() is None
    assert not (tmp_path / "saved").exists()
    assert keeper.stdin is not None
    keeper.stdin.close()
    assert keeper.wait(60) == 75
    assert (tmp_path / "saved").exists()
    assert ProcessGroup(token).members() == []
