"""What a run folder tells about its run, alive, silent and ended; written by the same rooms that write it in a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError, ExitCode
from dstrain.base.world import World
from dstrain.health.lease import RunLease
from dstrain.health.outcomes import write_exit
from dstrain.stages.run_status import ALIVE_S, duration, read_status
from tests.support.run_folders import beat, begin
from tests.support.tiny_checkpoints import save


def test_a_run_that_is_alive(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    save(run / "checkpoints", 4)
    with RunLease(run):
        for rank in range(4):
            beat(run, rank)
        status = read_status(run)
    assert (status.state, status.step, status.max_steps, status.stage, status.model) == (
        "running",
        6,
        100,
        "pretrain",
        "bert",
    )
    assert status.eta_s == pytest.approx(94, abs=1)
    assert status.numbers["loss"] == 5.0
    assert status.evaluated == {"step": 0, "loss": 6.0, "seconds": 1.0}
    assert status.saved is not None
    assert (status.saved.step, status.saved.read_back) == (4, True)
    assert [rank.host for rank in status.ranks] == ["n0", "n0", "n1", "n1"]
    assert status.waits_for == ""


def test_a_rank_that_waits_for_data_is_named_with_host_time_and_limit(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with RunLease(run):
        for rank in range(4):
            beat(run, rank, phase="data" if rank == 3 else "step", seconds=45.0, allowance=300.0)
        assert read_status(run).waits_for == "data: rank 3 on n1, for 45 s of at most 5 min"
        for rank in range(4):
            beat(run, rank, phase="save", seconds=7.0, allowance=None)
        assert read_status(run).waits_for == "save: all ranks on n0, for 7 s"
        for rank in range(4):
            beat(run, rank, seconds=20.0)
        assert read_status(run).waits_for == "step 7, for 20 s"


def test_a_killed_run_is_silent_and_says_since_when(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with RunLease(run):
        beat(run, 0)
        status = read_status(run, now=time.time() + ALIVE_S + 90)
    assert status.state == "silent"
    assert "nothing heard of process" in status.why
    assert status.waits_for == ""
    assert status.eta_s is None


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        (ExitCode.COMPLETE, "complete", ""), (ExitCode.SAVED_REQUEUE, "stopped", "code 75 SAVED_REQUEUE: SIGTERM"),
        (ExitCode.SAVED_END, "stopped", "code 82 SAVED_END: SIGTERM"), (ExitCode.BAD_INPUT, "failed", "code 78 BAD_INPUT: SIGTERM"),
    ],
)  # fmt: skip
def test_how_a_run_ended(tmp_path: Path, code: ExitCode, state: str, why: str) -> None:
    run = begin(tmp_path / "run")
    with RunLease(run):
        write_exit(run, World(), code=code, cause="SIGTERM", step=6)
    status = read_status(run)
    assert (status.state, status.why) == (state, why)


def test_a_rank_without_a_word_is_a_failure(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with RunLease(run):
        write_exit(run, World(0, 2), code=ExitCode.RETRY_HERE, cause="a peer is gone", step=6)
    status = read_status(run)
    assert status.state == "failed"
    assert "rank 1" in status.why


def test_damaged_and_missing_parts_are_left_out(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (save(run / "checkpoints", 4) / "manifest.json").write_text("garbage")
    save(run / "checkpoints", 2)
    for name in ("health", "lease", "exit", "attempts"):
        (run / name).mkdir(exist_ok=True)
    for name in (
        "health/rank-00000.json",
        "lease/00000001.json",
        "lease/00000001.beat",
        "exit/rank-00000.json",
        "attempts/0001.json",
        "supervisor.json",
    ):
        (run / name).write_bytes(b"\xff{[garbage")
    with open(run / "events.jsonl", "ab") as file:
        file.write(b'{"event": "step", "step": 7, "lo')
    status = read_status(run)
    assert (status.state, status.step, status.ranks) == ("not started", 6, ())
    assert status.saved is not None
    assert status.saved.step == 2


def test_only_the_end_of_long_events_is_read(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    text = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text('{"event": "filler", "time": 1.0, "x": "' + "y" * (2 << 20) + '"}\n' + text)
    assert read_status(run).step == 6


def test_a_folder_without_a_run_is_a_users_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run has begun"):
        read_status(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (99, "99 s"), (300, "5 min"), (7500, "2:05 h"), (273_600, "3 d 4 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
