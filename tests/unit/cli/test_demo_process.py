"""Children of the demo: clean environments, stopping that lets a child save, and killing what will not leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dstrain.base.errors import MachineError
from dstrain.cli import demo_process

_SAVES = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1], "saved").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "ready").touch()
while True:
    time.sleep(0.01)
"""


def _interrupt_once(path: Path) -> threading.Thread:
    """Press Ctrl-C on this process as soon as a file is there."""

    def wait_and_press() -> None:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait_and_press, daemon=True)
    thread.start()
    return thread


def test_a_child_inherits_no_rank_and_no_gpu() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin"}
    environment = demo_process.child_environment(given)
    assert environment["PATH"] == "/bin"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"} & environment.keys()


def test_the_launcher_beside_the_interpreter_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    command = demo_process.launcher_command("pretrain", "--config", "x.yaml", num_processes=2, port=1234)
    assert command[0] == str(tmp_path / "deepspeed")
    assert command[-5:] == ["--module", demo_process.MODULE, "pretrain", "--config", "x.yaml"]


def test_a_missing_launcher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="deepspeed"):
        demo_process.launcher_command("pretrain", num_processes=2, port=1234)


def test_the_exit_code_and_the_output_of_a_child_come_back(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out'); sys.exit(78)"]
    assert demo_process.run(command, stdout=tmp_path / "log") == 78
    assert (tmp_path / "log").read_text() == "out\n"


def test_ctrl_c_lets_the_child_save_first(tmp_path: Path) -> None:
    _interrupt_once(tmp_path / "ready")
    with pytest.raises(KeyboardInterrupt):
        demo_process.run([sys.executable, "-c", _SAVES, str(tmp_path)], stop_signal=signal.SIGTERM)
    assert (tmp_path / "saved").read_text() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_a_child_is_being_started_leaves_none_behind(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_and_be_stopped(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*args, **options))
        os.kill(os.getpid(), number)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start_and_be_stopped)
    with demo_process.stoppable(), pytest.raises(KeyboardInterrupt):
        demo_process.run([sys.executable, "-c", "import time; time.sleep(60)"])
    assert started[0].returncode is not None


def test_a_preempted_child_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    asked: list[bool] = []

    def preempt() -> bool:
        asked.append((tmp_path / "ready").exists())
        return asked[-1]

    command = [sys.executable, "-c", _SAVES, str(tmp_path)]
    assert demo_process.run(command, stop_signal=signal.SIGTERM, preempt=preempt) == 75
    assert asked.count(True) == 1


def test_a_child_that_will_not_leave_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_process, "GRACE_S", 0.2)
    stubborn = (
        "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid)); pathlib.Path(sys.argv[1], 'ready').touch();"
        "time.sleep(60)"
    )
    _interrupt_once(tmp_path / "ready")
    with pytest.raises(KeyboardInterrupt):
        demo_process.run([sys.executable, "-c", stubborn, str(tmp_path)])
    grandchild = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("the child's child lives on")


def test_launchers_are_not_taken_for_ranks() -> None:
    runs_module = demo_process._runs_module
    assert runs_module(["python", "-u", "-m", "dstrain.cli.main", "pretrain"])
    assert not runs_module(["python", "-u", "-m", "deepspeed.launcher.launch", "--module", "dstrain.cli.main"])
    assert not runs_module(["python", "bin/deepspeed", "--module", "dstrain.cli.main"])
    assert not runs_module(["python", "-m"])


def test_a_process_that_is_gone_has_no_ranks() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert demo_process.ranks_of(child.pid) == []
