"""Trials of the save protocol: what is there before a save, what is done to the save, and what must be found afterwards.

Each trial function runs one kind of fault so many times and returns a `Tally`; nobody here asserts. The fast tier
(`tests/fault`) and `benchmarks/soak.py` run the same functions with other numbers. Bytes are compared, nothing is tried twice.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.control import ControlPlane
from dstrain.base.errors import CheckpointError, StorageError
from dstrain.base.file_operations import operations_replaced
from dstrain.base.storage import read_json, write_json
from dstrain.checkpoint import background, writer
from dstrain.checkpoint.config import CheckpointConfig
from dstrain.checkpoint.layout import published_steps, step_folder
from dstrain.checkpoint.outcome import Published
from dstrain.checkpoint.reader import newest_valid
from dstrain.checkpoint.writer import CheckpointWriter
from tests.support.crash_disk import CrashDisk, build, fingerprint
from tests.support.faulty_disk import Fault, FaultyDisk, Operation
from tests.support.simulated_ranks import fork_ranks, run_threads
from tests.support.tiny_checkpoints import content, fragments_of, manifest_of, state_of

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE)
_CONFIG_YAML = "seed: 7\n"


@dataclass
class Tally:
    """Trials done and what went wrong in them; adds up."""

    trials: int = 0
    failures: list[str] = field(default_factory=list)
    points: int = 0
    """Distinct situations among the trials: operations killed at, states found."""

    def __iadd__(self, other: Tally) -> Tally:
        self.trials += other.trials
        self.points += other.points
        self.failures += other.failures
        return self


@dataclass(frozen=True)
class Scenario:
    """What is there before the save."""

    name: str
    existing: tuple[int, ...]
    """Steps of the checkpoints that are there."""
    keep_last: int
    step: int
    """The save's."""

    @property
    def previous(self) -> int | None:
        """Step of the newest that is there."""
        return self.existing[-1] if self.existing else None

    @property
    def kept(self) -> set[int]:
        """Steps that the end of the save leaves."""
        return set(sorted({*self.existing, self.step})[-self.keep_last :])


FIRST = Scenario("first save", (), 2, 2)
STEADY = Scenario("steady state", (2,), 2, 4)
ROTATION = Scenario("retention deletes one", (2, 4), 2, 6)
TIGHT = Scenario("retention leaves only the new one", (2, 4), 1, 6)
SCENARIOS = (FIRST, STEADY, ROTATION, TIGHT)


class Bench:
    """A scratch folder with everything the trials of one kind need again and again."""

    def __init__(self, scratch: Path) -> None:
        """Use an empty or missing folder, on a fast file system if there is one."""
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self.tokenizer = scratch / "tokenizer"
        self.tokenizer.mkdir()
        (self.tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
        self._references: dict[tuple[int, int], dict[str, bytes]] = {}
        self._prepared: dict[tuple[str, int], Path] = {}
        self._numbers = 0

    def fresh(self) -> Path:
        """A name that is free."""
        self._numbers += 1
        return self.scratch / f"trial-{self._numbers:06d}"

    def run_folder(self, scenario: Scenario, world_size: int) -> Path:
        """A run as the scenario has it; its checkpoints lie in `checkpoints/`, which the first save has to make."""
        key = (scenario.name, world_size)
        if key not in self._prepared:
            self._prepared[key] = self.scratch / f"prepared-{len(self._prepared)}"
            self._prepared[key].mkdir()
            for step in scenario.existing:
                self.save(self._prepared[key] / "checkpoints", step, world_size, keep_last=10)
        folder = self.fresh()
        shutil.copytree(self._prepared[key], folder)
        return folder

    def reference(self, step: int, world_size: int) -> dict[str, bytes]:
        """Every byte of the checkpoint that an undisturbed save of a step leaves."""
        if (step, world_size) not in self._references:
            folder = self.fresh()
            self.save(folder, step, world_size, keep_last=10)
            self._references[step, world_size] = content(step_folder(folder, step))
            shutil.rmtree(folder)
        return self._references[step, world_size]

    def save(self, folder: Path, step: int, world_size: int, *, keep_last: int, **options: Any) -> None:
        """Save in threads of this process; raises what a rank raises."""
        save = functools.partial(save_rank, folder, step, keep_last=keep_last, tokenizer=self.tokenizer, **options)
        for result in run_threads(world_size, save):
            if isinstance(result, BaseException):
                raise result


def save_rank(
    folder: Path, step: int, control: ControlPlane, *, keep_last: int, tokenizer: Path | None,
    clean: bool = False, on_published: Callable[[Published], None] | None = None,
    check_owner: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """One rank's part of a save, as a run does it."""
    world = control.world
    config = CheckpointConfig(every_steps=1, keep_last=keep_last, timeout_s=30.0)
    saver = CheckpointWriter(folder, config=config, control=control, check_owner=check_owner, on_published=on_published)
    if clean and world.is_first:
        saver.remove_leftovers()
    fragments = list(fragments_of(state_of(step), parts=world.size))
    mine = [f for i, f in enumerate(fragments) if i % world.size == world.rank]
    manifest = manifest_of(step, world_size=world.size)
    return saver.save(mine, manifest, config_yaml=_CONFIG_YAML, tokenizer=tokenizer)


def problems_of(
    bench: Bench, run: Path, world_size: int, *, allowed: set[int | None], unseen: set[int] = frozenset()
) -> list[str]:  # type: ignore[assignment]
    """What is wrong with the checkpoints of a run.

    Args:
        bench: has the bytes to compare with.
        run: the run folder.
        world_size: ranks that saved.
        allowed: steps of which one must be found; None stands for no checkpoint at all.
        unseen: steps that may be damaged, as a test has damaged them.
    """
    folder = run / "checkpoints"
    found = newest_valid(folder)
    step = found.checkpoint.manifest.step if found.checkpoint is not None else None
    problems = []
    if step not in allowed:
        problems.append(f"found step {step}, not one of {sorted(allowed, key=str)}")
    for number, path in published_steps(folder):
        if number not in unseen and content(path) != bench.reference(number, world_size):
            problems.append(f"{path.name} is not what was saved")
    problems += [f"{path.name}: {why}" for path, why in found.damaged if int(path.name[5:]) not in unseen]
    return problems


def next_save_problems(bench: Bench, run: Path, world_size: int) -> list[str]:
    """Whether the run goes on: the next save, after the clean-up of a start, works and leaves only checkpoints."""
    folder = run / "checkpoints"
    try:
        bench.save(folder, 8, world_size, keep_last=2, clean=True)
    except (CheckpointError, StorageError) as error:
        return [f"the next save failed: {error}"]
    problems = problems_of(bench, run, world_size, allowed={8})
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith(("step-", "damaged-step-")))
    return problems + ([f"left behind: {left}"] if left else [])


# --- kills -----------------------------------------------------------------------------------------------------------


def undisturbed(bench: Bench, scenario: Scenario, world_size: int) -> tuple[list[list[str]], float]:
    """Kinds of each rank's operations in a save that nobody disturbs, and its seconds; raises when it does not work."""
    run = bench.run_folder(scenario, world_size)
    logs = bench.fresh()
    logs.mkdir()

    def job(control: ControlPlane, mark: Callable[[int], None]) -> None:
        disk = FaultyDisk()
        _forked_save(bench, run, scenario, {control.world.rank: lambda _told: disk})(control, mark)
        write_json(logs / str(control.world.rank), [operation.kind for operation in disk.log])

    started = time.monotonic()
    ended = fork_ranks(world_size, job, rng=random.Random(0))
    seconds = time.monotonic() - started
    problems = problems_of(bench, run, world_size, allowed={scenario.step})
    if not ended.ok or problems:
        raise AssertionError(f"{scenario.name}, {world_size} ranks, without a fault: {ended} {problems}")
    kinds = [read_json(logs / str(rank)) for rank in range(world_size)]
    shutil.rmtree(run)
    shutil.rmtree(logs)
    return kinds, seconds


def kill_at_operation(
    bench: Bench, scenario: Scenario, world_size: int, rank: int, at: int, *, torn: bool, rng: random.Random
) -> list[str]:
    """SIGKILL a rank at one of its operations; returns what is wrong afterwards."""
    run = bench.run_folder(scenario, world_size)
    disks = {rank: lambda told: FaultyDisk(Fault.kills(torn=torn), at=at, counted=told)}
    ended = fork_ranks(world_size, _forked_save(bench, run, scenario, disks), rng=rng)
    return _after_a_kill(bench, run, scenario, world_size, ended.ok)


def kill_at_a_time(
    bench: Bench, scenario: Scenario, world_size: int, longest_s: float, rng: random.Random
) -> list[str]:
    """SIGKILL some ranks at a random time; returns what is wrong afterwards."""
    run = bench.run_folder(scenario, world_size)
    victims = rng.sample(range(world_size), rng.randint(1, world_size))
    ended = fork_ranks(
        world_size, _forked_save(bench, run, scenario, {}), rng=rng,
        kill=lambda r: (r.uniform(0, longest_s), victims),
    )  # fmt: skip
    return _after_a_kill(bench, run, scenario, world_size, ended.ok)


def every_crash_point(bench: Bench, scenario: Scenario, world_size: int, *, seed: int) -> Tally:
    """Kill every rank at each of its operations, before it and, of a write, in its middle."""
    tally = Tally()
    operations, _ = undisturbed(bench, scenario, world_size)
    rng = random.Random(seed)
    for rank, kinds in enumerate(operations):
        for at, kind in enumerate(kinds, 1):
            for torn in (False, True) if kind == "write" else (False,):
                problems = kill_at_operation(bench, scenario, world_size, rank, at, torn=torn, rng=rng)
                tally.trials += 1
                tally.failures += [
                    f"{scenario.name}, {world_size} ranks, rank {rank} killed at {at}: {p}" for p in problems
                ]
            tally.points += 1
    return tally


def random_kills(bench: Bench, trials: int, *, seed: int, worlds: tuple[int, ...] = (1, 2, 3)) -> Tally:
    """Kill at a random time or a random operation of a random rank, in a random scenario and world."""
    rng = random.Random(seed)
    tally = Tally(trials)
    known: dict[tuple[str, int], tuple[list[list[str]], float]] = {}
    for trial in range(trials):
        scenario, world_size = rng.choice(SCENARIOS), rng.choice(worlds)
        key = (scenario.name, world_size)
        if key not in known:
            known[key] = undisturbed(bench, scenario, world_size)
        operations, seconds = known[key]
        if rng.random() < 0.5:
            rank = rng.randrange(world_size)
            at = rng.randint(1, len(operations[rank]))
            problems = kill_at_operation(
                bench, scenario, world_size, rank, at, torn=rng.random() < 0.5, rng=rng
            )  # fmt: skip
        else:
            problems = kill_at_a_time(bench, scenario, world_size, 1.1 * seconds, rng)
        tally.failures += [f"seed {seed}, trial {trial}, {scenario.name}, {world_size} ranks: {p}" for p in problems]
    tally.points = len(known)
    return tally


def _forked_save(
    bench: Bench, run: Path, scenario: Scenario, disks: dict[int, Callable[..., FaultyDisk]]
) -> Callable[..., None]:
    def job(control: ControlPlane, mark: Callable[[int], None]) -> None:
        logging.disable(logging.CRITICAL)
        disk = disks.get(control.world.rank, lambda told: FaultyDisk(counted=told))(mark)
        with operations_replaced(disk):
            save_rank(
                run / "checkpoints", scenario.step, control, keep_last=scenario.keep_last, tokenizer=bench.tokenizer,
                clean=True,
            )  # fmt: skip

    return job


def _after_a_kill(bench: Bench, run: Path, scenario: Scenario, world_size: int, came_through: bool) -> list[str]:
    allowed = {scenario.step} if came_through else {scenario.previous, scenario.step}
    problems = problems_of(bench, run, world_size, allowed=allowed)
    problems += next_save_problems(bench, run, world_size)
    shutil.rmtree(run)
    return problems


# --- errors ----------------------------------------------------------------------------------------------------------


def faults() -> list[Fault]:
    """All that an operation may meet."""
    return [*(Fault.fails(number) for number in ERRORS), Fault.short(), Fault.done_but_told_failed(errno.EIO)]


def every_storage_error(
    bench: Bench, scenario: Scenario, world_size: int, *, about: str = "", chosen: Callable[[], list[Fault]] = faults,
    lasting: tuple[bool, ...] = (False, True),
) -> Tally:  # fmt: skip
    """Let each operation of a save (whose path contains `about`) meet each fault, once or from then on."""
    tally = Tally()
    counter = FaultyDisk(about=about)
    run = bench.run_folder(scenario, world_size)
    with operations_replaced(counter):
        bench.save(run / "checkpoints", scenario.step, world_size, keep_last=scenario.keep_last)
    shutil.rmtree(run)
    for at in range(1, counter.count + 1):
        for fault in chosen():
            for for_good in lasting:
                disk = FaultyDisk(fault, at=at, about=about, lasting=for_good)
                problems = storage_error(bench, scenario, world_size, disk, fault)
                tally.trials += 1
                tally.failures += [f"{scenario.name}, {world_size} ranks, {fault.name} at {at}: {p}" for p in problems]
        tally.points += 1
    return tally


def storage_error(bench: Bench, scenario: Scenario, world_size: int, disk: FaultyDisk, fault: Fault) -> list[str]:
    """One save that meets an error; returns what is wrong afterwards."""
    run = bench.run_folder(scenario, world_size)
    folder = run / "checkpoints"
    saved, problems = False, []
    with operations_replaced(disk):
        try:
            bench.save(folder, scenario.step, world_size, keep_last=scenario.keep_last)
            saved = True
        except (CheckpointError, StorageError):
            pass
        except Exception as error:  # noqa: BLE001  (what a user would see as a traceback)
            problems.append(f"unexpected {type(error).__name__}: {error}")
    hit = f" ({disk.hit})"
    if saved and disk.hit is not None and must_fail(fault, disk.hit):
        problems.append("told as saved, though what it needs had failed" + hit)
    if not saved and fault.name == "short":
        problems.append("a short write, which is no error, failed the save" + hit)
    allowed = {scenario.step} if saved else {scenario.previous, scenario.step}
    problems += [p + hit for p in problems_of(bench, run, world_size, allowed=allowed)]
    steps = {step for step, _ in published_steps(folder)}
    if not saved and not set(scenario.existing[-1:]) <= steps:
        problems.append(f"a failed save has taken away step {scenario.previous}" + hit)
    problems += [p + hit for p in next_save_problems(bench, run, world_size)]
    shutil.rmtree(run)
    return problems


def must_fail(fault: Fault, hit: Operation) -> bool:
    """Whether a save that met this may not be told as saved: a checkpoint's own file or name did not become durable.

    Not those that a second try behind freed space may mend, nor what only tidies up.
    """
    if fault.name not in ("EIO", "EROFS", "EACCES", "ESTALE"):
        return False
    names = hit.path.split(" ")
    if ".reports" in hit.path or ".deleting" in hit.path:
        return False
    own = any(".staging-" in name for name in names)
    if hit.kind == "sync_directory":
        return own
    return own and hit.kind in ("create", "write", "fsync", "close", "rename", "make_directory")


# --- power loss ------------------------------------------------------------------------------------------------------


def power_losses(bench: Bench, scenario: Scenario, world_size: int, *, per_moment: int, seed: int) -> Tally:
    """Lose the power behind every operation of a save, so many times, and look at what is found."""
    run = bench.run_folder(scenario, world_size)
    disk = CrashDisk(run)
    told: list[int] = []
    with operations_replaced(disk):
        bench.save(
            run / "checkpoints", scenario.step, world_size, keep_last=scenario.keep_last,
            on_published=lambda _published: told.append(disk.moment),
        )  # fmt: skip
    tally = Tally()
    if not disk.knows_all():
        tally.failures.append(f"{scenario.name}: something was written behind the door")
    verdicts: dict[tuple[bytes, bool], list[str]] = {}
    for moment, tree in disk.states(random.Random(seed), per_moment=per_moment):
        promised = moment >= told[0]
        key = fingerprint(tree), promised
        if key not in verdicts:
            found = bench.fresh()
            build(tree, found)
            allowed = {scenario.step} if promised else {scenario.previous, scenario.step}
            verdicts[key] = problems_of(bench, found, world_size, allowed=allowed)
            shutil.rmtree(found)
        tally.trials += 1
        tally.failures += [
            f"{scenario.name}, {world_size} ranks, seed {seed}, moment {moment}: {p}" for p in verdicts[key]
        ]
    tally.points = len(verdicts)
    shutil.rmtree(run)
    return tally


# --- surroundings ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fast_bench() -> Iterator[Bench]:
    """A bench in memory where the system has some, else wherever temporary files go."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="dstrain-trials-", dir=place))
    before = background._LOOK_S, writer._ROUND_S
    background._LOOK_S, writer._ROUND_S = 0.001, 0.02  # a trial is too short for the pauses of a real save
    logging.disable(logging.CRITICAL)
    try:
        yield Bench(scratch)
    finally:
        logging.disable(logging.NOTSET)
        background._LOOK_S, writer._ROUND_S = before
        shutil.rmtree(scratch, ignore_errors=True)
