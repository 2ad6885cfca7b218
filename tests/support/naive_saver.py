"""How checkpoints are often saved: files in place, no fsync, a `latest` file rewritten while other ranks still write.

The order is that of DeepSpeed's `save_checkpoint` (files, `latest`, then the barrier). It is here to fail: a
harness that finds nothing wrong with it sees nothing.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from dstrain.base.control import ControlPlane
from dstrain.base.file_operations import operations, operations_replaced
from tests.support.crash_disk import CrashDisk, build
from tests.support.faulty_disk import Fault, FaultyDisk
from tests.support.simulated_ranks import fork_ranks, run_threads
from tests.support.storage_trials import Bench, Tally

_PIECES = 4
_PIECE_BYTES = 4096


def save(folder: Path, step: int, control: ControlPlane) -> None:
    """One rank's part."""
    disk, world = operations(), control.world
    place = folder / f"global_step{step}"
    if world.is_first:
        disk.make_directory(place)
    control.barrier()
    handle = disk.create(place / f"rank-{world.rank}")
    for piece in _pieces(step, world.rank):
        disk.write(handle, memoryview(piece))
    disk.close(handle)
    if world.is_first:
        if (folder / "latest").exists():
            disk.unlink(folder / "latest")
        handle = disk.create(folder / "latest")
        disk.write(handle, memoryview(str(step).encode()))
        disk.close(handle)
    control.barrier()


def problems_of(folder: Path, world_size: int, *, allowed: set[int]) -> list[str]:
    """What a resume by the pointer would meet."""
    try:
        step = int((folder / "latest").read_text())
    except (OSError, ValueError) as error:
        return [f"latest: {error}"]
    if step not in allowed:
        return [f"latest says {step}"]
    for rank in range(world_size):
        path = folder / f"global_step{step}" / f"rank-{rank}"
        if not path.is_file() or path.read_bytes() != b"".join(_pieces(step, rank)):
            return [f"{path.name} of step {step} is torn"]
    return []


def kills(bench: Bench, trials: int, *, seed: int) -> Tally:
    """Kill one of two ranks at a random operation of the second save."""
    rng = random.Random(seed)
    tally = Tally(trials)
    for _ in range(trials):
        folder = _saved_once(bench, 2)
        job = functools.partial(_killed_save, folder, rng.randrange(2), rng.randint(1, 10))
        ended = fork_ranks(2, job, rng=rng)
        tally.failures += problems_of(folder, 2, allowed={2} if ended.ok else {1, 2})
        shutil.rmtree(folder)
    return tally


def _killed_save(folder: Path, victim: int, at: int, control: ControlPlane, _mark: Callable[[int], None]) -> None:
    with operations_replaced(FaultyDisk(Fault.kills(torn=True), at=at if control.world.rank == victim else 0)):
        save(folder, 2, control)


def power_losses(bench: Bench, *, per_moment: int, seed: int) -> Tally:
    """Lose the power during and after the second save."""
    folder = _saved_once(bench, 2)
    disk = CrashDisk(folder)
    with operations_replaced(disk):
        run_threads(2, lambda control: save(folder, 2, control))
    tally = Tally()
    for moment, tree in disk.states(random.Random(seed), per_moment=per_moment):
        found = bench.fresh()
        build(tree, found)
        allowed = {2} if moment == disk.moment else {1, 2}
        tally.trials += 1
        tally.failures += problems_of(found, 2, allowed=allowed)
        shutil.rmtree(found)
    return tally


def _saved_once(bench: Bench, world_size: int) -> Path:
    folder = bench.fresh()
    folder.mkdir()
    run_threads(world_size, lambda control: save(folder, 1, control))
    return folder


def _pieces(step: int, rank: int) -> list[bytes]:
    return [random.Random(f"{step} {rank} {i}").randbytes(_PIECE_BYTES) for i in range(_PIECES)]
