"""Chains of worlds, batches, kills and restarts: what was committed is the plan's beginning, no row missing, none twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.config import validate
from dstrain.base.errors import CheckpointError
from dstrain.base.world import World
from dstrain.data.config import DataConfig
from dstrain.data.loader import PackedLoader
from dstrain.data.plan import rank_slots
from dstrain.data.plan_spec import plan_spec

ROWS = {"a": np.array([5, 9, 1, 7, 4, 8, 6, 3]), "b": np.array([6, 2, 5])}


@dataclass
class Facts:
    fingerprint: str = "f" * 64
    num_blocks: int = 8


@dataclass
class Dataset:
    """A dataset whose blocks nobody reads: order is all that matters here."""

    name: str
    manifest: Any


class Source:
    sequence_length = 32

    def __init__(self, name: str, fingerprint: str = "f" * 64) -> None:
        self.dataset = Dataset(name, Facts(fingerprint))


def loader_of(
    *, rank: int = 0, size: int = 1, phases: Any = (), seed: int = 1, fingerprint: str = "f" * 64, **data: Any
) -> PackedLoader:
    sources = [{"name": "a", "path": "a", "weight": 3}, {"name": "b", "path": "b", "weight": 1}]
    section = {"sources": sources, "lanes": 2, "window_rows": 4, "phases": list(phases), **data}
    spec = plan_spec(validate(DataConfig, section, source="x"), ROWS, global_batch=4, seed=seed)
    made = {name: Source(name, fingerprint) for name in ROWS}
    return PackedLoader(made, spec, None, corruption="none", world=World(rank=rank, size=size), micro_batch=4)  # type: ignore[arg-type]


def rows_of_rank(loader: PackedLoader, step: int, *, rank: int, size: int) -> list[tuple[int, ...]]:
    first, last = rank_slots(loader.plan.global_batch(step), rank=rank, world_size=size)
    planned = loader.plan.slots(step, first, last)
    return list(zip(*(getattr(planned, name).tolist() for name in ("source", "epoch", "block", "row"))))


segments = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.sampled_from([None, 2, 6, 8])),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(segments, st.integers(0, 2**40))
def test_committed_steps_are_the_plans_beginning_whatever_happened(chain: Any, seed: int) -> None:
    check_chain(chain, seed)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(segments, st.integers(0, 2**40))
def test_thousands_of_random_worlds_and_restarts(chain: Any, seed: int) -> None:
    check_chain(chain, seed)


def check_chain(chain: Any, seed: int) -> None:
    """Each segment: a world, steps it commits, steps it makes after its last save and loses, a batch from then on."""
    phases: list[dict[str, int]] = []
    committed: list[list[tuple[int, ...]]] = []
    state: dict[str, Any] | None = None
    for size, kept, lost, batch in chain:
        if batch is not None and len(committed) >= 1:
            phases = [p for p in phases if p["from_step"] < len(committed)]
            phases.append({"from_step": len(committed) + 1, "global_batch": batch})
        ranks = [loader_of(rank=rank, size=size, phases=phases, seed=seed) for rank in range(size)]
        for loader in ranks:
            if state is not None:
                assert loader.restore(json.loads(json.dumps(state)), step=len(committed)) is None
        start = len(committed)
        for step in range(start, start + kept + lost):
            rows = [
                row for rank, loader in enumerate(ranks) for row in rows_of_rank(loader, step, rank=rank, size=size)
            ]
            if step < start + kept:
                committed.append(rows)
        state = ranks[0].state_dict()
    whole = loader_of(phases=phases, seed=seed)
    assert committed == [rows_of_rank(whole, step, rank=0, size=1) for step in range(len(committed))]
    assert set(Counter(row for step in committed for row in step).values()) <= {1}


@settings(max_examples=50)
@given(st.integers(1, 30))
def test_what_was_trained_on_cannot_be_changed_and_what_is_to_come_can(step: int) -> None:
    state = loader_of(phases=[{"from_step": 10, "global_batch": 8}]).state_dict()
    other = loader_of(phases=[{"from_step": 10, "global_batch": 6}], skip_steps=[[12, 14]])
    if step <= 10:
        assert other.restore(state, step=step) is None
    else:
        with pytest.raises(CheckpointError, match=r"phases: \[\[10, 8.*\[\[10, 6"):
            other.restore(state, step=step)


def test_other_data_begins_a_recorded_era_only_on_purpose() -> None:
    first = loader_of()
    other = loader_of(fingerprint="e" * 64)
    with pytest.raises(CheckpointError, match=r"fingerprints: .*--accept-new-data"):
        other.restore(first.state_dict(), step=6)
    difference = other.restore(first.state_dict(), step=6, accept_new_data=True)
    assert difference is not None
    assert difference.startswith("fingerprints")
    assert (other.era, other.origin, other.history[0]["until_step"]) == (1, 6, 6)
    again = loader_of(fingerprint="e" * 64)
    assert again.restore(json.loads(json.dumps(other.state_dict())), step=9) is None
    assert rows_of_rank(again, 9, rank=0, size=1) == rows_of_rank(other, 9, rank=0, size=1)
    third = loader_of(fingerprint="d" * 64)
    third.restore(again.state_dict(), step=9, accept_new_data=True)
    assert (third.era, [entry["until_step"] for entry in third.history]) == (2, [6, 9])
    assert "history" not in third.history[1]


def test_closed_blocks_survive_a_resume_and_show_in_what_is_planned() -> None:
    loader = loader_of()
    [entry] = loader.close_blocks([("a", 1)], from_step=5)
    assert entry == ("a", 1, 5)
    again = loader_of()
    again.restore(json.loads(json.dumps(loader.state_dict())), step=4)
    before, after = loader_of().planned(0, 40), again.planned(0, 40)
    number = again.names.index("a")
    hit = (before.source == number) & (before.block == 1)
    assert hit[before.step >= 5].any()
    assert (after.block[hit & (after.step >= 5)] == -1).all()
    same = ~hit | (before.step < 5)
    assert (after.block[same] == before.block[same]).all()


def test_the_state_is_small() -> None:
    assert len(json.dumps(loader_of(phases=[{"from_step": 9, "global_batch": 8}]).state_dict())) <= 1024


def test_a_step_far_ahead_is_found_without_reading_or_walking(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data is touched (these sources have none), and the arithmetic does not depend on how far a step is."""
    loader = loader_of()
    calls = Counter()
    for order in loader.plan.orders:
        whole = order.locate
        monkeypatch.setattr(
            order, "locate", lambda lane, turn, whole=whole: calls.update([len(lane)]) or whole(lane, turn)
        )
    counted = []
    for step in (0, 10**6, 10**9):
        calls.clear()
        loader.plan.slots(step, 0, 4)
        counted.append(sum(size * times for size, times in calls.items()))
    assert counted == [4, 4, 4]
