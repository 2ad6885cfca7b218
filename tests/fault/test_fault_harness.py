"""The test of the tests: the disks that fail and crash do what they say, and see what they are there to see."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.base import storage
from dstrain.base.control import ControlPlane
from dstrain.base.errors import StorageError
from dstrain.base.file_operations import FileOperations, operations, operations_replaced
from tests.support import naive_saver
from tests.support.crash_disk import CrashDisk, Tree
from tests.support.faulty_disk import KINDS, Fault, FaultyDisk
from tests.support.simulated_ranks import fork_ranks, run_threads
from tests.support.storage_trials import Bench

pytestmark = pytest.mark.fault


# --- the failing disk ------------------------------------------------------------------------------------------------


def test_every_operation_of_the_door_can_be_made_to_fail() -> None:
    public = {name for name in vars(FileOperations) if not name.startswith("_")}
    assert public == set(KINDS)


def test_the_fault_comes_at_its_operation_once_or_for_good(tmp_path: Path) -> None:
    def outcomes(**options: bool) -> list[bool]:
        disk = FaultyDisk(Fault.fails(errno.EIO), at=2, kinds=("make_directory",), **options)
        done = []
        for number in range(4):
            try:
                disk.make_directory(tmp_path / f"{options} {number}")
                done.append(True)
            except OSError:
                done.append(False)
        assert (disk.count, disk.hit) == (4, disk.log[1])
        return done

    assert outcomes() == [True, False, True, True]
    assert outcomes(lasting=True) == [True, False, False, False]


def test_only_what_it_is_about_counts_also_behind_a_handle(tmp_path: Path) -> None:
    disk = FaultyDisk(about="one")
    for name in ("one", "two"):
        disk.close(disk.create(tmp_path / name))
    disk.rename(tmp_path / "two", tmp_path / "one")
    assert [operation.kind for operation in disk.log] == ["create", "close", "rename"]


def test_a_short_write_takes_half_and_a_lying_one_changes_a_bit(tmp_path: Path) -> None:
    data = memoryview(b"abcdef")
    for name, fault, left in (("s", Fault.short(), b"abc"), ("b", Fault.flips_a_bit(), b"abc`ef")):
        disk = FaultyDisk(fault, at=1, kinds=("write",))
        handle = disk.create(tmp_path / name)
        assert disk.write(handle, data) == len(left)
        assert (tmp_path / name).read_bytes() == left


def test_a_lost_answer_leaves_the_operation_done(tmp_path: Path) -> None:
    disk = FaultyDisk(Fault.done_but_told_failed(errno.EIO), at=1)
    with pytest.raises(OSError, match="Input/output"):
        disk.make_directory(tmp_path / "x")
    assert (tmp_path / "x").is_dir()


def test_a_kill_leaves_what_was_written_before_it(tmp_path: Path) -> None:
    def job(_control: ControlPlane, mark: Callable[[int], None]) -> None:
        disk = FaultyDisk(Fault.kills(torn=True), at=2, kinds=("write",), counted=mark)
        handle = disk.create(tmp_path / "x")
        disk.write(handle, memoryview(b"abcd"))
        disk.write(handle, memoryview(b"efgh"))
        disk.write(handle, memoryview(b"ijkl"))

    ended = fork_ranks(1, job, rng=random.Random(0))
    assert (ended.codes, ended.marks) == ([-signal.SIGKILL], [2])
    assert (tmp_path / "x").read_bytes() == b"abcdef"


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_threads_and_processes_agree_like_ranks(tmp_path: Path) -> None:
    def talk(control: ControlPlane) -> list[object]:
        rank = control.world.rank
        return [
            control.sum([rank, 1]),
            control.gather_json({"r": rank}),
            control.from_first(rank + 7),
            control.all_true(rank != 1),
        ]

    expected = [[3, 3], [{"r": 0}, {"r": 1}, {"r": 2}], 7, False]
    assert run_threads(3, talk) == [expected] * 3

    def job(control: ControlPlane, mark: Callable[[int], None]) -> None:
        mark(1 + int(talk(control) == expected))

    assert fork_ranks(3, job, rng=random.Random(0)).marks == [2, 2, 2]


def test_when_one_rank_dies_the_others_are_killed() -> None:
    def job(control: ControlPlane, _mark: Callable[[int], None]) -> None:
        if control.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    assert fork_ranks(3, job, rng=random.Random(0)).codes == [-signal.SIGKILL] * 3


def test_ranks_that_hang_are_an_error() -> None:
    with pytest.raises(TimeoutError):
        fork_ranks(2, lambda _control, _mark: signal.pause(), rng=random.Random(0), limit_s=0.2)


# --- the crashing disk -----------------------------------------------------------------------------------------------


def found_after(tmp_path: Path, protocol: Callable[[Path], None], *, ended: bool = True) -> list[Tree]:
    """States after a power loss: behind the protocol's end, or anywhere in it."""
    root = tmp_path / "disk"
    root.mkdir()
    (root / "x").write_bytes(b"old!")
    disk = CrashDisk(root)
    with operations_replaced(disk):
        protocol(root)
    assert disk.knows_all()
    return [tree for at, tree in disk.states(random.Random(1), per_moment=60) if at == disk.moment or not ended]


def written(root: Path, name: str, *, fsync: bool = True) -> None:
    disk = operations()
    handle = disk.create(root / name)
    disk.write(handle, memoryview(b"new!"))
    if fsync:
        disk.fsync(handle)
    disk.close(handle)


def test_the_protocol_of_the_door_shows_the_old_or_the_new_content_and_at_its_end_the_new(tmp_path: Path) -> None:
    states = found_after(tmp_path, lambda root: void(storage.write_bytes(root / "x", b"new!")), ended=False)
    assert {tree.get("x") for tree in states} == {b"old!", b"new!"}


def void(_result: object) -> None:
    """Makes an action of a function with a result."""


def test_at_the_end_of_the_door_s_protocol_only_the_new_content_is_found(tmp_path: Path) -> None:
    states = found_after(tmp_path, lambda root: void(storage.write_bytes(root / "x", b"new!")))
    assert {tree.get("x") for tree in states} == {b"new!"}


def test_a_missing_fsync_of_the_content_shows(tmp_path: Path) -> None:
    def protocol(root: Path) -> None:
        written(root, "y", fsync=False)
        operations().rename(root / "y", root / "x")
        operations().sync_directory(root)

    found = {tree.get("x") for tree in found_after(tmp_path, protocol)}
    assert {b"", b"new!"} < found
    assert any(content not in (b"new!", b"") for content in found), "a torn or zeroed file belongs to the model"
    assert b"old!" not in found


def test_a_missing_sync_of_the_folder_shows(tmp_path: Path) -> None:
    def protocol(root: Path) -> None:
        written(root, "y")
        operations().rename(root / "y", root / "x")

    assert {tree.get("x") for tree in found_after(tmp_path, protocol)} == {b"old!", b"new!"}


def test_a_rename_that_comes_before_the_content_shows(tmp_path: Path) -> None:
    def protocol(root: Path) -> None:
        disk = operations()
        handle = disk.create(root / "y")
        disk.rename(root / "y", root / "x")
        disk.sync_directory(root)
        disk.write(handle, memoryview(b"new!"))
        disk.fsync(handle)
        disk.close(handle)

    assert {tree.get("x") for tree in found_after(tmp_path, protocol, ended=False)} > {b"old!", b"", b"new!"}


def test_a_rename_is_never_half_done_and_names_are_lost_in_any_subset(tmp_path: Path) -> None:
    def protocol(root: Path) -> None:
        written(root, "y")
        operations().sync_directory(root)
        operations().rename(root / "y", root / "z")
        operations().unlink(root / "x")
        operations().make_directory(root / "d")

    found = {frozenset(tree) for tree in found_after(tmp_path, protocol)}
    assert found == {
        frozenset({name, *x, *d}) for name in ("y", "z") for x in ((), ("x",)) for d in ((), ("d",))
    }  # fmt: skip


def test_names_in_a_folder_need_that_folder_s_own_sync(tmp_path: Path) -> None:
    def protocol(root: Path) -> None:
        operations().make_directory(root / "d")
        written(root / "d", "y")
        operations().sync_directory(root)

    states = found_after(tmp_path, protocol)
    assert all("d" in tree for tree in states)
    assert {tree.get("d/y") for tree in states} == {None, b"new!"}


def test_a_second_name_and_an_appended_file_are_modelled(tmp_path: Path) -> None:
    def protocol(root: Path) -> None:
        storage.create_exclusively(root / "lease", b"mine")
        storage.append_scratch(root / "x", b"more")

    states = found_after(tmp_path, protocol)
    assert all(tree["lease"] == b"mine" for tree in states)
    assert {b"old!", b"old!more"} < {tree["x"] for tree in states}
    assert all(tree["x"] is not None and tree["x"].startswith(b"old!") for tree in states), "durable bytes stay"


def test_a_write_behind_the_door_is_noticed(tmp_path: Path) -> None:
    disk = CrashDisk(tmp_path)
    assert disk.knows_all()
    (tmp_path / "x").write_bytes(b"")
    assert not disk.knows_all()


# --- the control -----------------------------------------------------------------------------------------------------


def test_a_naive_saver_fails_under_kills_and_under_power_loss(bench: Bench) -> None:
    """Else the harness is blind, and what it says about the real saver is worth nothing."""
    killed = naive_saver.kills(bench, 40, seed=5)
    assert len(killed.failures) >= 0.15 * killed.trials, killed.failures
    lost = naive_saver.power_losses(bench, per_moment=20, seed=5)
    assert len(lost.failures) >= 0.1 * lost.trials


def test_a_naive_saver_works_when_nothing_happens(tmp_path: Path) -> None:
    for step in (1, 2):
        assert run_threads(2, lambda control, step=step: naive_saver.save(tmp_path, step, control)) == [None, None]
    assert naive_saver.problems_of(tmp_path, 2, allowed={2}) == []


def test_the_errors_of_the_door_are_storage_errors_under_every_fault(tmp_path: Path) -> None:
    for number in (errno.EIO, errno.ESTALE, errno.EFBIG):
        with operations_replaced(FaultyDisk(Fault.fails(number), at=1)), pytest.raises(StorageError):
            storage.write_bytes(tmp_path / "x", b"")
