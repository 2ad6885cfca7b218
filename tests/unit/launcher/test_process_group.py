"""Processes are found by the mark they inherit: also orphans, never bystanders; ranks are told from launchers and workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstrain.launcher.process_group import ProcessGroup, ask
from dstrain.launcher.starters import TOKEN

SLEEP = "import time; time.sleep(600)"
_RANK = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""
_TREE = """
import os, subprocess, sys, time
for rank in "01":
    command = [sys.executable, "-c", *sys.argv[1:]]
    subprocess.Popen(command, env={**os.environ, "RANK": rank}, start_new_session=True)
time.sleep(600)
"""
_SAVES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "saved").touch(), sys.exit(75)))
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""
_IGNORES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""


_TELLS = f"""#!{sys.executable}
import pathlib, signal, sys
def tell(number, frame):
    pathlib.Path(sys.argv[1], signal.Signals(number).name).touch()
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, tell)
pathlib.Path(sys.argv[1], "ready").touch()
signal.pause()
"""


@pytest.fixture
def group() -> Iterator[ProcessGroup]:
    group = ProcessGroup(uuid.uuid4().hex)
    yield group
    group.kill()


def _start(group: ProcessGroup, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env={**os.environ, TOKEN: group.token})


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_whole_tree_is_found_ranks_are_its_middle_and_orphans_still_belong_to_it(group: ProcessGroup) -> None:
    launcher = _start(group, _TREE, _RANK, SLEEP)
    _until(lambda: len(group.members()) == 5)
    assert sorted(group.ranks().values()) == [0, 1]
    assert {p.ppid() for p in group.ranks()} == {launcher.pid}
    assert set(group.to_ask()) == set(group.ranks())
    ranks = group.ranks()
    launcher.kill()
    launcher.wait()
    assert len(group.members()) == 4
    assert group.ranks() == ranks
    assert group.kill() == []
    assert group.members() == []


def test_without_ranks_the_topmost_process_is_asked(group: ProcessGroup) -> None:
    plain = _start(group, SLEEP)
    _until(lambda: len(group.members()) == 1)
    assert group.ranks() == {}
    assert [p.pid for p in group.to_ask()] == [plain.pid]
    plain.kill()
    plain.wait()


def test_processes_that_look_alike_but_carry_no_or_another_mark_survive(group: ProcessGroup) -> None:
    ours = _start(group, SLEEP)
    others = [
        subprocess.Popen([sys.executable, "-c", SLEEP]),
        subprocess.Popen([sys.executable, "-c", SLEEP], env={**os.environ, TOKEN: group.token + "0"}),
        subprocess.Popen([sys.executable, "-c", SLEEP], env={**os.environ, "X": f"{TOKEN}={group.token}"}),
    ]
    try:
        _until(lambda: len(group.members()) == 1)
        assert group.kill() == []
        assert ours.wait(10) == -signal.SIGKILL
        assert [p.poll() for p in others] == [None] * 3
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_a_spared_process_is_no_member(group: ProcessGroup) -> None:
    process = _start(group, SLEEP)
    _until(lambda: len(group.members()) == 1)
    assert ProcessGroup(group.token, spare=[process.pid]).members() == []
    process.kill()
    process.wait()


def test_who_saves_in_time_is_not_killed(group: ProcessGroup, tmp_path: Path) -> None:
    process = _start(group, _SAVES, str(tmp_path))
    _until((tmp_path / "ready").exists)
    assert group.wind_down(grace_s=60) == []
    assert process.wait(10) == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("hurried", [False, True])
def test_who_does_not_leave_is_killed_when_the_time_is_up_or_somebody_hurries(
    group: ProcessGroup, tmp_path: Path, hurried: bool
) -> None:
    process = _start(group, _IGNORES, str(tmp_path))
    _until((tmp_path / "ready").exists)
    assert group.wind_down(grace_s=3600 if hurried else 0.1, hurry=lambda: hurried) == []
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(("name", "heard"), [("srun", "SIGUSR1"), ("torchrun", "SIGTERM")])
def test_srun_is_asked_in_a_way_that_lets_its_ranks_save(
    group: ProcessGroup, tmp_path: Path, name: str, heard: str
) -> None:
    (tmp_path / name).write_text(_TELLS)
    (tmp_path / name).chmod(0o755)
    process = subprocess.Popen([tmp_path / name, tmp_path], env={**os.environ, TOKEN: group.token})
    _until((tmp_path / "ready").exists)
    ask(group.members()[0], signal.SIGTERM)
    assert process.wait(60) == 0
    assert (tmp_path / heard).exists()
