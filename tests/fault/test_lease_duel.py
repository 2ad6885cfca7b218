"""At most one writer: a paused former owner goes on after a take-over and cannot publish; of five who start, one wins."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT

pytestmark = pytest.mark.fault

DUELS = 30
RACES = 25


class Worker:
    """A process of tests/support/lease_worker.py."""

    def __init__(self, machine: str, *options: str) -> None:
        command = [sys.executable, str(ROOT / "tests/support/lease_worker.py"), machine, *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT
        )

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> Any:
        self.say(command)
        answer = self.hear()
        return json.loads(answer) if answer.startswith("{") else answer

    def stop(self) -> None:
        """SIGSTOP, and be sure that it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*"))


def duel(folder: Path, owner: Worker, challenger: Worker, chance: random.Random) -> tuple[str, list[str], list[str]]:
    """Stop the owner anywhere in its work, let the challenger take over, let the owner go on.

    Returns:
        What the old owner said, what was published at the take-over, what is published when the old owner has given up.
    """
    before = len(steps(folder))
    owner.say("go")
    until(lambda: len(steps(folder)) > before + 1)
    instant = time.perf_counter() + chance.random() * 0.01
    while time.perf_counter() < instant:
        pass
    owner.stop()
    taken = challenger.ask(f"own {folder}")
    assert isinstance(taken, dict), taken
    owner.process.send_signal(signal.SIGCONT)
    said = owner.hear()
    return said, taken["published"], steps(folder)


def test_a_paused_owner_never_publishes_after_a_take_over(tmp_path: Path) -> None:
    seed = 4
    chance = random.Random(seed)
    refusals: set[str] = set()
    with Worker("one") as one, Worker("two") as two:
        owner, challenger = one, two
        epoch = owner.ask(f"own {tmp_path}")["epoch"]
        for number in range(DUELS):
            said, at_take_over, after = duel(tmp_path, owner, challenger, chance)
            assert after == at_take_over, f"seed {seed}, duel {number}: published after the take-over ({said})"
            assert said.startswith(("RunInUseError", "StorageError")), said
            assert challenger.ask("check") == "done"  # and its lease is untouched
            refusals.add(said.partition(":")[0])
            owner, challenger = challenger, owner
        left = sorted(p.name for p in (tmp_path / "lease").iterdir() if p.suffix == ".json")
        assert f"{epoch + DUELS:08d}.json" == left[-1]
    assert "RunInUseError" in refusals


def test_the_duel_sees_an_owner_that_does_not_ask(tmp_path: Path) -> None:
    """Negative control: the same duel against a job without the check finds folders published after the take-over."""
    with Worker("one", "--naive") as owner, Worker("two") as challenger:
        owner.ask(f"own {tmp_path}")
        owner.say("go")
        until(lambda: len(steps(tmp_path)) > 1)
        owner.stop()
        taken = challenger.ask(f"own {tmp_path}")
        owner.process.send_signal(signal.SIGCONT)
        until(lambda: len(steps(tmp_path)) > len(taken["published"]))


def test_a_rename_that_was_checked_before_the_take_over_has_nothing_to_rename(tmp_path: Path) -> None:
    """The one instant that the check cannot see, forced: stopped after the check, before the rename."""
    from dstrain.base.errors import StorageError
    from dstrain.base.storage import make_directory, publish_directory
    from dstrain.health.lease import RunLease

    with RunLease(tmp_path) as lease, Worker("two") as challenger:
        staging = tmp_path / ".staging-1-old"
        make_directory(staging)
        lease.check()
        lease._stop.set()  # silent from here on, as a stopped process is
        assert lease._thread is not None
        lease._thread.join()
        assert challenger.ask(f"own {tmp_path}")["published"] == []
        with pytest.raises(StorageError):
            publish_directory(staging, tmp_path / "step-00000001")
        assert steps(tmp_path) == []


def test_of_five_who_start_at_once_exactly_one_wins(tmp_path: Path) -> None:
    workers = [Worker("") for _ in range(5)]
    try:
        for race in range(RACES):
            folder = tmp_path / f"run-{race % 5}"  # new folders, then folders that others have left
            for worker in workers:
                worker.say(f"try {folder}")
            answers = [worker.hear() for worker in workers]
            winners = [n for n, answer in enumerate(answers) if answer.startswith("{")]
            assert len(winners) == 1, answers
            holder = workers[winners[0]]
            told = f"in use by process {holder.process.pid} on"
            assert all(told in answer for n, answer in enumerate(answers) if n not in winners), answers
            assert json.loads(answers[winners[0]])["epoch"] == race // 5 + 1
            assert holder.ask("check") == "done"
            holder.ask("leave")
    finally:
        for worker in workers:
            worker.__exit__()
