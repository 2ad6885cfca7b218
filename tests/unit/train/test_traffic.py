"""Formulas of a step's traffic; that they are what DeepSpeed sends is shown in tests/dist/test_traffic.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.models.anatomy import Anatomy, Product
from dstrain.train.traffic import Sharding, flat_elements, sharded_elements, step_collectives, wire_bytes

ANATOMY = Anatomy(
    family="bert", layers=2, hidden=512, intermediate=2048, heads=8, vocab=1000, gated=False,
    tensors=((512_000, True), *((262_144, True), (512, False)) * 8), layer_products=(Product(512, 512),), head_products=(),
    window=None, local_layers=0, dropout=0.0,
)  # fmt: skip
PARAMETERS = ANATOMY.parameters


def ring(stage: int, *, accumulation: int = 1, precision: str = "bf16", ranks: int = 8, **more: bool) -> float:
    sharding = Sharding(stage, precision, ranks, accumulation, **more)  # type: ignore[arg-type]
    return wire_bytes(step_collectives(ANATOMY, sharding), ranks) / (2 * PARAMETERS * (ranks - 1) / ranks)


@pytest.mark.parametrize(
    ("stage", "accumulation", "volume"),
    [(0, 1, 2), (0, 4, 2), (1, 1, 3), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 2), (3, 4, 8)],
)
def test_ring_volume_in_parameters(stage: int, accumulation: int, volume: float) -> None:
    """The table of docs/planner.md, in units of the parameters' bytes; stage 3 without its small weights."""
    assert ring(stage, accumulation=accumulation) == pytest.approx(volume, rel=2e-3)


def test_reducing_to_owners_saves_a_third_at_stage_2_and_nothing_in_the_default() -> None:
    assert ring(2, multi_rank_buckets=False) == pytest.approx(2, rel=1e-3)
    assert ring(2, accumulation=4, multi_rank_buckets=False) == pytest.approx(5, rel=1e-3)
    assert ring(1, multi_rank_buckets=False) == ring(1)


def test_one_rank_sends_nothing() -> None:
    assert all(step_collectives(ANATOMY, Sharding(stage, "bf16", 1, 4)) == () for stage in range(4))


def test_a_model_of_billions_is_gathered_twice_at_stage_3() -> None:
    huge = replace(ANATOMY, tensors=((10_000_000_000, True),))
    gather = next(c for c in step_collectives(huge, Sharding(3, "bf16", 8)) if c.kind == "all_gather")
    assert gather.num_bytes == pytest.approx(1.9 * 2 * huge.parameters, rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1, max_size=30), st.integers(1, 4096))
def test_padding_is_the_least_that_divides(tensors: list[tuple[int, bool]], ranks: int) -> None:
    anatomy = replace(ANATOMY, tensors=tuple(tensors))
    flat, sharded = flat_elements(anatomy, ranks), sharded_elements(anatomy, ranks)
    assert flat % (2 * ranks) == 0
    assert 0 <= flat - anatomy.parameters < 2 * 2 * ranks
    assert sharded % ranks == 0
    assert 0 <= sharded - anatomy.parameters < len(tensors) * ranks
