"""A save that is killed, or whose disk fails, leaves the previous checkpoint or the new one, and the run goes on.

Real processes and SIGKILL for the kills; every operation of a save meets every error. What counts is bytes; nothing is
tried twice. Many more random trials: `python benchmarks/soak.py`.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.base.errors import CheckpointError, RunInUseError
from dstrain.base.file_operations import operations_replaced
from dstrain.checkpoint.reader import newest_valid
from tests.support.faulty_disk import Fault, FaultyDisk
from tests.support.simulated_ranks import fork_ranks
from tests.support.storage_trials import (
    FIRST,
    ROTATION,
    SCENARIOS,
    STEADY,
    TIGHT,
    Bench,
    Scenario,
    every_crash_point,
    every_storage_error,
    problems_of,
    random_kills,
    save_rank,
)
from tests.support.tiny_checkpoints import content

pytestmark = pytest.mark.fault

SEED = 20261125


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_one_rank_is_killed_at_every_operation_of_a_save(scenario: Scenario, bench: Bench) -> None:
    tally = every_crash_point(bench, scenario, 1, seed=SEED)
    assert tally.failures == []
    assert tally.points >= 30, "a save has become shorter than anybody remembers: does the harness see it?"


@pytest.mark.parametrize("scenario", [FIRST, TIGHT], ids=lambda s: s.name)
def test_each_of_two_ranks_is_killed_at_every_operation_of_a_save(scenario: Scenario, bench: Bench) -> None:
    tally = every_crash_point(bench, scenario, 2, seed=SEED)
    assert tally.failures == []
    assert tally.points >= 50


def test_ranks_are_killed_at_random_times_and_operations(bench: Bench) -> None:
    assert random_kills(bench, 100, seed=SEED).failures == []


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", [FIRST, TIGHT], ids=lambda s: s.name)
def test_every_operation_of_a_save_meets_every_error_once_and_for_good(scenario: Scenario, bench: Bench) -> None:
    tally = every_storage_error(bench, scenario, 1)
    assert tally.failures == []
    assert tally.trials >= 600


def test_every_operation_of_the_other_rank_meets_every_error(bench: Bench) -> None:
    tally = every_storage_error(bench, ROTATION, 2, about="rank-00001", lasting=(False,))
    assert tally.failures == []
    assert tally.points >= 10


def test_a_disk_that_lies_is_found_out_before_the_checkpoint_gets_its_name(bench: Bench) -> None:
    for at in range(1, 5):
        run = bench.run_folder(STEADY, 1)
        disk = FaultyDisk(Fault.flips_a_bit(), at=at, kinds=("write",))
        with (
            operations_replaced(disk),
            pytest.raises(CheckpointError, match=r"other bytes than were written|not readable"),
        ):
            bench.save(run / "checkpoints", STEADY.step, 1, keep_last=2)
        assert disk.hit is not None
        assert problems_of(bench, run, 1, allowed={STEADY.previous}) == []


def test_a_job_that_lost_its_run_publishes_nothing_whenever_it_notices(bench: Bench) -> None:
    lost: list[bool] = []

    def check_owner() -> None:
        if lost:
            raise RunInUseError("taken over by process 1 on elsewhere")

    class Taken(FaultyDisk):
        """The run is taken over while the last file is written."""

        def fsync(self, handle: int) -> None:
            super().fsync(handle)
            if "manifest" in self.log[-1].path:
                lost.append(True)

    run = bench.run_folder(STEADY, 1)
    with operations_replaced(Taken()), pytest.raises(RunInUseError, match="taken over"):
        bench.save(run / "checkpoints", STEADY.step, 1, keep_last=2, check_owner=check_owner)
    assert lost
    assert problems_of(bench, run, 1, allowed={STEADY.previous}) == []


# --- the real thing --------------------------------------------------------------------------------------------------


def file_size_limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))


def unprivileged() -> None:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (file_size_limit, "would be larger than is allowed here"),
        pytest.param(
            unprivileged, "permission denied: choose a folder you may write to",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else"),
        ),
    ],
    ids=["RLIMIT_FSIZE", "another user"],
)  # fmt: skip
def test_a_limit_of_the_real_system_fails_the_save_and_nothing_else(
    prepare: Callable[[], None], why: str, bench: Bench, tmp_path: Path
) -> None:
    run = bench.run_folder(STEADY, 1)
    before = content(run)
    for path in (bench.scratch, run, *run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)

    def job(control: object, mark: Callable[[int], None]) -> None:
        prepare()
        try:
            save_rank(run / "checkpoints", STEADY.step, control, keep_last=2, tokenizer=bench.tokenizer)  # type: ignore[arg-type]
        except CheckpointError as error:
            mark(1 if why in str(error) else 2)

    ended = fork_ranks(1, job, rng=random.Random(0))
    assert (ended.codes, ended.marks) == ([0], [1])
    assert content(run) == before


FULL_DISK = """
import ctypes, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
place, size = sys.argv[1:3]
if libc.unshare(0x00020000) or libc.mount(None, b"/", None, 0x4000 | 0x40000, None):
    sys.exit(42)
if libc.mount(b"tmpfs", place.encode(), b"tmpfs", 0, size.encode()):
    sys.exit(42)
sys.path.insert(0, sys.argv[3])
from dstrain.base.errors import CheckpointError
from dstrain.checkpoint.reader import newest_valid
from tests.support.tiny_checkpoints import save
folder = Path(place) / "checkpoints"
step = 0
try:
    while step < 400:
        save(folder, step + 1, keep_last=1000)
        step += 1
except CheckpointError as error:
    assert "the disk is full" in str(error), error
assert 1 < step < 400, step
assert newest_valid(folder).checkpoint.manifest.step == step
assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:08d}" for n in range(1, step + 1)]
save(folder, step + 1, keep_last=2)  # the rule of another run frees some space, and the save works
assert newest_valid(folder).checkpoint.manifest.step == step + 1
if libc.mount(None, place.encode(), None, 0x20 | 0x1, None):
    sys.exit(43)
try:
    save(folder, step + 2)
except CheckpointError as error:
    assert "read-only" in str(error), error
else:
    raise AssertionError("saved on a read-only disk")
assert newest_valid(folder).checkpoint.manifest.step == step + 1
"""


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting needs root on Linux")
@pytest.mark.parametrize("limit", ["size=200k", "nr_inodes=60"])
def test_a_real_disk_fills_up_and_then_becomes_read_only(limit: str, tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), limit, str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode == 42:
        pytest.skip("this system does not let root mount a tmpfs of its own")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_that_may_not_be_written_by_a_file_in_its_place(bench: Bench) -> None:
    run = bench.fresh()
    run.mkdir()
    (run / "checkpoints").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no staging folder could be made"):
        bench.save(run / "checkpoints", 2, 1, keep_last=2)
    assert newest_valid(run / "checkpoints").checkpoint is None
