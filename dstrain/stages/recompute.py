"""Make steps of a run again, from the data on disk, and compare their ledgers with what the run wrote down.

The ledger does not depend on the number of processes, so one process checks a run of any world size, also one that changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dstrain.base.errors import DamagedBlockError, DataError
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.data.loader import PackedLoader
from dstrain.stages.record import LedgerPoint

SAMPLE_TOKENS = 200_000_000
"""Tokens made again without --full: about half a minute of one core."""
_MOST_STEPS, _FEWEST_STEPS = 256, 8


@dataclass(frozen=True)
class Recomputed:
    """How far the ledgers agree."""

    steps: int
    """Steps made again."""
    compared: int
    """Written ledgers (of a step or a total) that were compared and are equal."""
    first_difference: int | None
    """The first step, counted from 1, known to differ; None when all agree."""
    problem: str = ""
    """What differs there."""


def sample_steps(points: Sequence[LedgerPoint], *, origin: int, tokens_per_step: int) -> list[int]:
    """Steps (counted from 1) whose own ledger is written down, evenly spread, first and last among them.

    Args:
        points: what was written.
        origin: optimizer steps done when the present data began; earlier ones cannot be made again.
        tokens_per_step: decides how many are affordable.
    """
    known = sorted({p.step for p in points if p.of_step is not None and p.step > origin})
    number = min(_MOST_STEPS, max(_FEWEST_STEPS, SAMPLE_TOKENS // max(1, tokens_per_step)), len(known))
    if number < 2:
        return known[:number]
    return [known[i * (len(known) - 1) // (number - 1)] for i in range(number)]


def recompute_sample(
    loader: PackedLoader, points: Sequence[LedgerPoint], steps: Sequence[int], *, threads: int, advance: Callable[[int], None]
) -> Recomputed:  # fmt: skip
    """Make some steps again; between the last good and the first bad one, look for the first that differs.

    Args:
        loader: a world of one, restored from the run's checkpoint.
        points: what was written.
        steps: from `sample_steps`.
        threads: steps made at the same time.
        advance: called with the steps made since the last call.
    """
    good = loader.origin
    made = compared = 0
    for step, ledger in _ledgers(loader, [s - 1 for s in steps], threads=threads):
        made += 1
        advance(1)
        agreed, problem = _compare(points, step + 1, of_step=ledger, total=None)
        compared += agreed
        if not problem:
            good = step + 1
            continue
        between = sorted({p.step for p in points if good < p.step < step + 1 and p.of_step is not None})
        for earlier, ledger_ in _ledgers(loader, [s - 1 for s in between], threads=threads):
            made += 1
            _, problem_ = _compare(points, earlier + 1, of_step=ledger_, total=None)
            if problem_:
                return Recomputed(made, compared, earlier + 1, problem_)
        return Recomputed(made, compared, step + 1, problem)
    return Recomputed(made, compared, None)


def recompute_all(
    loader: PackedLoader, points: Sequence[LedgerPoint], *, until: int, threads: int, advance: Callable[[int], None]
) -> Recomputed:
    """Make every step again and compare each written ledger and total; stops at the first that differs.

    Args:
        loader: a world of one, restored from the run's checkpoint.
        points: what was written.
        until: optimizer steps done.
        threads: steps made at the same time.
        advance: called with the steps made since the last call.
    """
    total = 0 if loader.origin == 0 else next(
        (p.total for p in points if p.step == loader.origin and p.total is not None), None
    )  # fmt: skip
    by_step: dict[int, list[LedgerPoint]] = {}
    for point in points:
        by_step.setdefault(point.step, []).append(point)
    made, compared, good = 0, 0, loader.origin
    for step, ledger in _ledgers(loader, range(loader.origin, until), threads=threads):
        made += 1
        advance(1)
        total = None if total is None or isinstance(ledger, str) else (total + ledger) % LEDGER_MODULUS
        agreed, problem = _compare(by_step.get(step + 1, ()), step + 1, of_step=ledger, total=total, good=good)
        compared += agreed
        if problem:
            return Recomputed(made, compared, step + 1, problem)
        if agreed:
            good = step + 1
    return Recomputed(made, compared, None)


def _ledgers(loader: PackedLoader, steps: Sequence[int], *, threads: int) -> Iterator[tuple[int, int | str]]:
    """(step from 0, its ledger, or why it cannot be made), in order."""

    def make(step: int) -> int | str:
        try:
            return loader.step(step).ledger
        except (DamagedBlockError, DataError) as error:
            return str(error)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="dstrain-audit")
    try:
        # A bounded look-ahead: a long run would else queue a task for each of its steps.
        for at in range(0, len(steps), 64 * threads):
            part = steps[at : at + 64 * threads]
            yield from zip(part, pool.map(make, part))
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(
    points: Sequence[LedgerPoint], step: int, *, of_step: int | str, total: int | None, good: int | None = None
) -> tuple[int, str]:
    """(written values that agree, what differs)."""
    if isinstance(of_step, str):
        return 0, f"step {step} cannot be made again: {of_step}"
    agreed = 0
    for point in points:
        if point.step != step:
            continue
        if point.of_step is not None:
            if point.of_step != of_step:
                return agreed, f"{point.where}: ledger of the step is {point.of_step}, the data on disk gives {of_step}"
            agreed += 1
        if total is not None and point.total is not None:
            if point.total != total:
                since = (
                    "" if good is None or good + 1 >= step else f" (something differs in steps {good + 1} to {step})"
                )
                return agreed, f"{point.where}: total ledger is {point.total}, the data on disk gives {total}{since}"
            agreed += 1
    return agreed, ""
