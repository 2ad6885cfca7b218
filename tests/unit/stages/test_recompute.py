"""Which steps are made again, and that the first difference is found wherever it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DamagedBlockError
from dstrain.stages.recompute import recompute_all, recompute_sample, sample_steps
from dstrain.stages.record import LedgerPoint


class _Step:
    def __init__(self, ledger: int) -> None:
        self.ledger = ledger


class _Loader:
    """Steps with made-up ledgers; one of them may be unreadable."""

    def __init__(self, *, origin: int = 0, damaged: int | None = None) -> None:
        self.origin, self.damaged, self.made = origin, damaged, 0

    def step(self, step: int) -> _Step:
        self.made += 1
        if step == self.damaged:
            raise DamagedBlockError("shard-7.tar: block 3 is damaged")
        return _Step(2**62 + 17 * step)


def truth(last: int, *, every: int = 1, origin: int = 0, before: int = 0) -> list[LedgerPoint]:
    points, total = [], before
    for step in range(origin + 1, last + 1):
        ledger = 2**62 + 17 * (step - 1)
        total = (total + ledger) % 2**63
        if step % every == 0:
            points.append(LedgerPoint(step=step, where=f"event of {step}", of_step=ledger, total=total))
    return points


def tampered(points: list[LedgerPoint], step: int, **fields: Any) -> list[LedgerPoint]:
    return [LedgerPoint(**{**vars(p), **fields}) if p.step == step else p for p in points]


@given(
    last=st.integers(1, 5000), every=st.integers(1, 50), tokens=st.integers(1, 10**8), origin=st.integers(0, 100)
)  # fmt: skip
def test_a_sample_is_even_affordable_and_has_both_ends(last: int, every: int, tokens: int, origin: int) -> None:
    points = truth(last, every=every)
    chosen = sample_steps(points, origin=origin, tokens_per_step=tokens)
    known = [p.step for p in points if p.step > origin]
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(known)
    assert len(chosen) == min(len(known), max(8, min(256, 200_000_000 // tokens)))
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (known[0], known[-1])
        gaps = [known.index(b) - known.index(a) for a, b in pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_all_steps_agree_with_a_true_history(threads: int) -> None:
    loader = _Loader()
    points = truth(300)
    found = recompute_all(loader, points, until=300, threads=threads, advance=lambda _: None)  # type: ignore[arg-type]
    assert found.first_difference is None
    assert (found.steps, found.compared) == (300, 600)


@given(bad=st.integers(1, 120), every=st.sampled_from([1, 4, 10]))
def test_the_first_step_that_differs_is_found_by_a_full_audit(bad: int, every: int) -> None:
    points = truth(120, every=every)
    shown = next((p.step for p in points if p.step >= bad), None)
    forged = [
        LedgerPoint(p.step, p.where, of_step=p.of_step, total=(p.total or 0) + 1) if p.step >= bad else p
        for p in points
    ]
    found = recompute_all(_Loader(), forged, until=120, threads=1, advance=lambda _: None)  # type: ignore[arg-type]
    assert found.first_difference == shown
    assert shown is None or f"event of {shown}" in found.problem


def test_a_total_that_differs_between_logged_steps_names_the_stretch() -> None:
    points = tampered(truth(40, every=10), 30, total=1)
    found = recompute_all(_Loader(), points, until=40, threads=1, advance=lambda _: None)  # type: ignore[arg-type]
    assert "steps 21 to 30" in found.problem


@pytest.mark.parametrize("bad", [1, 57, 58, 200])
def test_a_sample_walks_back_to_the_first_step_that_differs(bad: int) -> None:
    points = [p if p.step < bad else LedgerPoint(p.step, p.where, of_step=3, total=p.total) for p in truth(200)]
    chosen = sample_steps(points, origin=0, tokens_per_step=10**8)
    assert len(chosen) == 8
    found = recompute_sample(_Loader(), points, chosen, threads=2, advance=lambda _: None)  # type: ignore[arg-type]
    assert found.first_difference == bad


def test_data_that_begins_later_starts_from_the_total_of_that_step() -> None:
    points = [LedgerPoint(50, "checkpoint", total=999), *truth(60, origin=50, before=999)]
    found = recompute_all(_Loader(origin=50), points, until=60, threads=1, advance=lambda _: None)  # type: ignore[arg-type]
    assert (found.first_difference, found.steps, found.compared) == (None, 10, 20)


def test_a_block_that_cannot_be_read_is_the_difference() -> None:
    loader = _Loader(damaged=11)
    found = recompute_all(loader, truth(20), until=20, threads=1, advance=lambda _: None)  # type: ignore[arg-type]
    assert found.first_difference == 12
    assert "block 3 is damaged" in found.problem
