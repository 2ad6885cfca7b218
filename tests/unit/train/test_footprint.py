"""Parts of a rank's memory; that they are what processes take is shown in tests/dist/test_footprint.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.models.anatomy import Anatomy
from dstrain.train.footprint import RESERVE, Batch, fits, footprint, largest_micro_batch, scaled
from dstrain.train.traffic import Sharding
from tests.unit.train.test_traffic import ANATOMY

ROW = Batch(512, 154, 512.0)
NOTHING = Batch(0, 0, 0.0)


def states(stage: int, precision: str, ranks: int, anatomy: Anatomy = ANATOMY) -> float:
    """Bytes a parameter of what is there all the time, framework left out."""
    found = footprint(anatomy, Sharding(stage, precision, ranks), NOTHING, device="cuda")  # type: ignore[arg-type]
    return sum(p.num_bytes for p in found.parts if p.moment == "always" and p.name != "framework") / anatomy.parameters


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "expected"),
    [
        (0, "fp32", 8, 12), (0, "bf16", 8, 14), (1, "bf16", 1, 18), (1, "bf16", 8, 6 + 12 / 8), (1, "fp32", 8, 4 + 12 / 8),
        (2, "bf16", 8, 2 + 12 / 8), (2, "fp32", 8, 4 + 12 / 8), (3, "bf16", 8, 2 + 2 + 18 / 8),
    ],
)  # fmt: skip
def test_states_in_bytes_a_parameter(stage: int, precision: str, ranks: int, expected: float) -> None:
    """Stage 1 in bf16 keeps a full fp32 gradient buffer; stage 3 a bucket and, below half a billion parameters, gathered weights."""
    assert states(stage, precision, ranks) == pytest.approx(expected, rel=2e-3)


def test_the_total_is_the_sum_of_its_parts() -> None:
    found = footprint(ANATOMY, Sharding(1, "bf16", 8, 4), ROW, device="cuda")
    assert found.total == sum(part.num_bytes for part in found.at_peak())
    assert found.total == max(found.at("backward"), found.at("reduction"))


def test_accumulation_keeps_gradients_while_a_backward_runs() -> None:
    one, four = (footprint(ANATOMY, Sharding(0, "fp32", 2, n), ROW, device="cpu") for n in (1, 4))
    assert four.at("backward") - one.at("backward") == 4 * ANATOMY.parameters


@given(st.integers(0, 3), st.sampled_from(["bf16", "fp32"]), st.integers(1, 64), st.integers(1, 400))
def test_the_largest_micro_batch_fits_and_no_larger_one_does(stage: int, precision: str, ranks: int, rows: int) -> None:
    sharding = Sharding(stage, precision, ranks)  # type: ignore[arg-type]
    capacity = 4e9

    def fit(number: int) -> bool:
        split = replace(sharding, accumulation=-(-rows // number))
        return fits(ANATOMY, split, scaled(ROW, number), device="cuda", capacity_bytes=capacity)

    found = largest_micro_batch(ANATOMY, sharding, ROW, device="cuda", capacity_bytes=capacity, rows=rows)
    assert found == max((number for number in range(1, rows + 1) if fit(number)), default=0)


@given(st.integers(0, 3), st.integers(1, 64), st.integers(1, 64))
def test_memory_grows_with_rows_and_shrinks_with_ranks(stage: int, rows: int, ranks: int) -> None:
    few = footprint(ANATOMY, Sharding(stage, "bf16", ranks), scaled(ROW, rows), device="cpu").total
    more = footprint(ANATOMY, Sharding(stage, "bf16", ranks), scaled(ROW, rows + 1), device="cpu").total
    spread = footprint(ANATOMY, Sharding(stage, "bf16", 2 * ranks + 2), scaled(ROW, rows), device="cpu").total
    assert more >= few
    if ranks > 1:
        assert spread <= few + 8 * 64 * ranks  # padding


def test_a_reserve_is_left() -> None:
    sharding = Sharding(0, "bf16", 1)
    total = footprint(ANATOMY, sharding, ROW, device="cuda").total
    assert not fits(ANATOMY, sharding, ROW, device="cuda", capacity_bytes=total)
    assert fits(ANATOMY, sharding, ROW, device="cuda", capacity_bytes=1 + total / (1 - RESERVE))
