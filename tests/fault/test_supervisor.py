"""The supervisor with real processes: restarts, crash loops, orphans, signals, bystanders, and one real training run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dstrain.checkpoint.layout import published_steps
from dstrain.launcher.history import failure_statistics, read_history
from dstrain.launcher.process_group import ProcessGroup
from dstrain.launcher.starters import TOKEN
from tests.support.fake_stage import fake_command
from tests.support.runs import ROOT, build_tiny_shards, pretrain_settings, step_events, write_config
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

ALWAYS = None


def _fault(rank: int, step: int, do: str | int, attempt: int | None = ALWAYS) -> dict[str, Any]:
    return {"attempt": attempt, "rank": rank, "step": step, "do": do}


class Supervised:
    """A supervisor of fake ranks, as a process."""

    def __init__(self, folder: Path, **plan: Any) -> None:
        self.run, path = folder / "run", folder / "plan.json"
        path.write_text(json.dumps(plan))
        self.log = folder / "log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                fake_command("supervise", self.run, path),
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def wait(self, timeout_s: float = 60) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output()) from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def reached(self, step: int, attempt: int = 1) -> bool:
        return any(e["step"] >= step and e["attempt"] == attempt for e in _events(self.run))

    def pid(self, rank: int, attempt: int = 1) -> int:
        return int((self.run / f"pid-{attempt}-{rank}").read_text())

    def left(self) -> list[int]:
        """Processes of any attempt that still live."""
        return [p.pid for record in read_history(self.run) for p in ProcessGroup(record.mark).members()]


@contextmanager
def _supervised(folder: Path, **plan: Any) -> Iterator[Supervised]:
    job = Supervised(folder, **plan)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.kill()
        job.process.wait()
        for record in read_history(job.run):
            ProcessGroup(record.mark).kill()


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _steps(run: Path) -> list[int]:
    return [step for step, _ in published_steps(run / "checkpoints")]


def test_crashes_kills_and_passing_faults_are_restarted_until_the_run_is_complete(tmp_path: Path) -> None:
    faults = [
        _fault(1, 3, "kill", 1),
        _fault(0, 9, "crash", 2),
        _fault(1, 15, 76, 3),
        _fault(0, 23, "kill-launcher", 4),
    ]
    with _supervised(tmp_path, steps=36, step_s=0.05, faults=faults) as job:
        assert job.wait() == 0, job.output()
        assert job.left() == []
        records = read_history(job.run)
        assert [r.code for r in records] == [None, None, 76, 75, 0]
        assert [r.ranks_at_fault for r in records[:3]] == [(1,), (0,), (1,)]
        assert [
            max(r.checkpoint_before, r.reached_before) >= least for r, least in zip(records, (-1, 3, 9, 15, 23))
        ] == [True] * 5
        assert records[-1].reached_after == 36
        assert failure_statistics(job.run).failures == 3
        assert "restart 1 of 6" in job.output()
        assert (job.run / "logs" / "attempt-0005.log").exists()
        # Words of earlier attempts are kept, apart from those of the last.
        assert json.loads((job.run / "logs/exit-before-attempt-0004/rank-00001.json").read_text())["code"] == 76
        assert {json.loads(p.read_text())["code"] for p in (job.run / "exit").glob("*.json")} == {0}


def test_a_crash_loop_ends_with_79_after_a_try_from_further_back_and_keeps_every_checkpoint(tmp_path: Path) -> None:
    with _supervised(tmp_path, steps=20, save_every=2, step_s=0.05, faults=[_fault(0, 7, 1)]) as job:
        assert job.wait() == 79, job.output()
        records = read_history(job.run)
        assert [r.checkpoint_before for r in records] == [-1, 6, 6, 4]
        assert "planned at step 7" in job.output().split("round in circles")[1]
        assert str(job.run / "logs/attempt-0004.log") in job.output()
        assert _steps(job.run)[0] == 6
        # Step 6 was written again from further back; what was set aside is still there.
        assert (job.run / "checkpoints" / "set-aside-step-00000006").is_dir()
        assert job.left() == []


def test_a_checkpoint_that_makes_the_run_fail_is_set_aside_and_the_run_completes(tmp_path: Path) -> None:
    """The fault sits in the attempts that start from step 6: three of them, by number."""
    faults = [_fault(0, 7, 1, attempt) for attempt in (1, 2, 3)]
    with _supervised(tmp_path, steps=10, save_every=2, step_s=0.05, faults=faults) as job:
        assert job.wait() == 0, job.output()
        assert [r.checkpoint_before for r in read_history(job.run)] == [-1, 6, 6, 4]
        assert "kept for inspection as set-aside-step-00000006" in job.output()


def test_a_loop_that_never_saves_again_gets_its_newest_checkpoint_back(tmp_path: Path) -> None:
    faults = [_fault(0, 7, 1, 1), *(_fault(0, step, 1, n) for n in (2, 3, 4) for step in (5, 7))]
    with _supervised(tmp_path, steps=20, save_every=2, step_s=0.05, faults=faults) as job:
        assert job.wait() == 79, job.output()
        assert _steps(job.run) == [6, 4, 2]
        assert not list((job.run / "checkpoints").glob("set-aside-*"))


@pytest.mark.parametrize("code", [78, 79, 80, 81, 82])
def test_codes_that_say_do_not_are_passed_on_at_once(tmp_path: Path, code: int) -> None:
    with _supervised(tmp_path, faults=[_fault(1, 2, code)]) as job:
        assert job.wait() == code, job.output()
        assert len(read_history(job.run)) == 1


def test_restarts_are_bounded_also_with_progress(tmp_path: Path) -> None:
    faults = [_fault(0, step, "crash", attempt) for attempt, step in enumerate((3, 5, 9, 13), start=1)]
    with _supervised(tmp_path, steps=40, faults=faults, policy={"max_restarts": 2}) as job:
        assert job.wait() == 76, job.output()
        assert "2 restarts are used up (--max-restarts)" in job.output()
        assert [r.reached_after for r in read_history(job.run)] == [3, 5, 9]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_supervisor_lets_the_ranks_save_and_ends_with_75(
    tmp_path: Path, number: signal.Signals
) -> None:
    with _supervised(tmp_path, steps=100_000, save_every=50_000) as job:
        job.until(lambda: job.reached(3) and (job.run / "pid-1-1").exists())
        job.process.send_signal(number)
        assert job.wait() == 75, job.output()
        exits = [json.loads(p.read_text()) for p in sorted((job.run / "exit").glob("*.json"))]
        assert [(e["code"], e["cause"]) for e in exits] == [(75, number.name)] * 2
        assert _steps(job.run) == [exits[0]["step"]]
        assert len(read_history(job.run)) == 1
        assert job.left() == []


def test_a_rank_that_will_not_leave_is_killed_after_the_grace(tmp_path: Path) -> None:
    with _supervised(tmp_path, steps=100_000, faults=[_fault(1, 2, "ignore-term")], policy={"grace_s": 1.0}) as job:
        job.until(lambda: job.reached(4) and (job.run / "pid-1-1").exists())
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()  # rank 0 saved its last step: nothing was lost
        assert job.left() == []


def test_a_third_request_kills_at_once(tmp_path: Path) -> None:
    faults = [_fault(0, 2, "ignore-term"), _fault(1, 2, "ignore-term")]
    with _supervised(
        tmp_path, steps=100_000, faults=faults, policy={"grace_s": 3600.0, "hurry_grace_s": 3600.0}
    ) as job:
        job.until(lambda: job.reached(2) and (job.run / "pid-1-1").exists())
        for count in (1, 2, 3):
            job.process.send_signal(signal.SIGTERM)
            job.until(lambda count=count: job.output().count("asking the ranks") == count)  # type: ignore[misc]
        assert job.wait() == 76, job.output()  # two steps were not saved
        assert job.left() == []


def test_a_signal_to_a_rank_alone_is_a_restart_not_an_end(tmp_path: Path) -> None:
    with _supervised(tmp_path, steps=40, step_s=0.03) as job:
        job.until(lambda: job.reached(3) and (job.run / "pid-1-1").exists())
        for rank in (0, 1):
            os.kill(job.pid(rank), signal.SIGTERM)
        assert job.wait() == 0, job.output()
        assert [r.code for r in read_history(job.run)] == [75, 0]
        assert failure_statistics(job.run).failures == 0


def test_orphans_of_a_killed_launcher_are_cleaned_up_and_bystanders_are_not(tmp_path: Path) -> None:
    """A launcher that dies leaves its ranks; a foreign process with the same command line, and another token, must live."""
    script = "import time; time.sleep(600)"
    alike = [sys.executable, "-c", script, "tests/support/fake_stage.py", "rank", str(tmp_path / "run")]
    bystanders = [
        subprocess.Popen(alike, start_new_session=True),
        subprocess.Popen(alike, env={**os.environ, TOKEN: "another-attempt"}, start_new_session=True),
    ]
    try:
        with _supervised(
            tmp_path, steps=12, faults=[_fault(1, 2, "ignore-term", 1)], policy={"hurry_grace_s": 0.2}
        ) as job:
            job.until(lambda: job.reached(3))
            rank = psutil.Process(job.pid(1))
            token = read_history(job.run)[0].mark
            launcher = next(p for p in ProcessGroup(token).members() if p.pid == rank.ppid())
            launcher.kill()
            job.process.send_signal(signal.SIGUSR1)
            job.until(lambda: "asking the ranks" in job.output())
            job.process.send_signal(signal.SIGUSR1)
            job.wait()
            assert job.left() == []
            assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
        assert [p.poll() for p in bystanders] == [None, None]
    finally:
        for process in bystanders:
            process.kill()
            process.wait()


def test_ranks_of_a_killed_supervisor_save_and_leave_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with _supervised(tmp_path, steps=100_000, save_every=50_000) as job:
        job.until(lambda: job.reached(3) and (job.run / "pid-1-1").exists())
        job.process.kill()
        job.until(lambda: (job.run / "exit/rank-00000.json").exists() and (job.run / "exit/rank-00001.json").exists())
        job.until(lambda: job.left() == [])
        [saved] = _steps(job.run)
        assert json.loads((job.run / "exit/rank-00000.json").read_text())["step"] == saved
    with _supervised(tmp_path, steps=saved + 2, save_every=50_000) as again:
        assert again.wait() == 0, again.output()
        first, second = read_history(again.run)
        assert first.cause == "the supervisor was killed"
        assert first.ended is not None
        assert (second.checkpoint_before, second.code) == (saved, 0)


def test_a_killed_keeper_leaves_nothing_either(tmp_path: Path) -> None:
    with _supervised(tmp_path, steps=30, step_s=0.03) as job:
        job.until(lambda: job.reached(3) and (job.run / "pid-1-1").exists())
        [keeper] = [p for p in psutil.Process(job.process.pid).children() if "dstrain.launcher.keeper" in p.cmdline()]
        keeper.kill()
        assert job.wait() == 0, job.output()
        assert job.left() == []


def test_the_others_of_a_dead_rank_are_ended_in_bounded_time(tmp_path: Path) -> None:
    """The launcher does not care, the other rank would run on for an hour: the supervisor ends it half a second later."""
    faults = [_fault(1, 3, "kill", 1)]
    with _supervised(
        tmp_path, steps=8, step_s=0.02, careless=True, faults=[*faults, _fault(0, 4, "ignore-term", 1)]
    ) as job:
        assert job.wait() == 0, job.output()
        assert "rank 1 is gone" in job.output()
        assert [r.code for r in read_history(job.run)] == [None, 0]


@pytest.mark.timeout(600)
def test_a_real_run_with_a_killed_rank_finishes_with_the_ledger_of_the_undisturbed_run(
    tmp_path: Path, zygote: Zygote
) -> None:
    shards = build_tiny_shards(tmp_path)
    steps = {"train": {"max_steps": 24}, "checkpoint": {"every_steps": 4}}
    calm = write_config(tmp_path / "calm.yaml", pretrain_settings(shards, tmp_path / "calm", **steps))
    with zygote.start_ranks(calm, world_size=1) as undisturbed:
        undisturbed.succeed()
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, run, **steps))
    command = [
        sys.executable, "-m", "dstrain.cli.main", "launch", "pretrain", str(config), "--with", "deepspeed",
        "--num-processes", "2", "--max-restarts", "3",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with log.open("wb") as out:
        launched = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + 120
        while max(step_events(run), default=0) < 6:
            assert launched.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        ranks = ProcessGroup(read_history(run)[0].mark).ranks()
        assert sorted(ranks.values()) == [0, 1]
        next(process for process, number in ranks.items() if number == 1).kill()
        assert launched.wait(200) == 0, log.read_text()
    finally:
        launched.kill()
        launched.wait()
    records = read_history(run)
    # The watchdog beside the killed rank leaves a word, 76, unless the launcher is faster and ends it, too.
    assert [r.code for r in records] in ([76, 0], [None, 0]), log.read_text()
    assert records[0].ranks_at_fault == (1,), log.read_text()
    assert "Traceback" not in log.read_text()
    assert records[1].checkpoint_before >= 4
    assert [p.pid for r in records for p in ProcessGroup(r.mark).members()] == []
    ours, theirs = step_events(run), step_events(tmp_path / "calm")
    assert sorted(ours) == sorted(theirs) == list(range(1, 25))
    assert [ours[n]["ledger"] for n in sorted(ours)] == [theirs[n]["ledger"] for n in sorted(theirs)]
