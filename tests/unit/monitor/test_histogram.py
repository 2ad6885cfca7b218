"""Counts of parts add up to those of the whole, nothing is lost, and TensorBoard draws every element in its bucket."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dstrain.monitor import histogram as histogram_module
from dstrain.monitor.histogram import EMPTY, bucket_edges, histogram_of, num_buckets, packed, unpacked

VALUES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=60)


@given(VALUES)
def test_every_element_is_in_the_bucket_below_its_edge(values: list[float]) -> None:
    found = histogram_of(torch.tensor(values))
    edges = torch.tensor(bucket_edges(), dtype=torch.float32).tolist()
    expected = [0] * num_buckets()
    for value in values:
        expected[sum(edge < value for edge in edges)] += 1
    assert list(found.counts) == expected
    assert found.size == len(values)
    assert found.total == pytest.approx(math.fsum(values), rel=1e-6, abs=1e-30)


@given(VALUES, VALUES)
def test_parts_add_up_to_the_whole(one: list[float], two: list[float]) -> None:
    parts, whole = (
        histogram_of(torch.tensor(one)) + histogram_of(torch.tensor(two)),
        histogram_of(torch.tensor(one + two)),
    )
    assert parts.counts == whole.counts
    assert (parts.total, parts.squares) == pytest.approx((whole.total, whole.squares), rel=1e-6)


@given(st.lists(VALUES, max_size=4))
def test_what_ranks_add_up_is_taken_apart_again(parts: list[list[float]]) -> None:
    found = [histogram_of(torch.tensor(values)) for values in parts]
    assert unpacked(*packed(found)) == found


def test_a_tensor_is_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.linspace(-2, 3, 1000).reshape(10, 100)
    whole = histogram_of(tensor)
    monkeypatch.setattr(histogram_module, "_PIECE", 7)
    pieces = histogram_of(tensor)
    assert pieces.counts == whole.counts
    assert (pieces.total, pieces.squares) == pytest.approx((whole.total, whole.squares), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_and_extremes_have_a_bucket(dtype: torch.dtype) -> None:
    found = histogram_of(torch.tensor([0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype))
    assert found.size == 4
    assert (found.counts[0], found.counts[-1]) == (1, 2)


@given(VALUES.filter(bool))
def test_only_the_occupied_buckets_are_drawn_behind_an_empty_neighbour(values: list[float]) -> None:
    found = histogram_of(torch.tensor(values))
    edges, counts = found.occupied()
    assert sum(counts) == found.size
    assert counts[-1] > 0
    assert counts[0] == 0 or found.counts[0] > 0, "the lowest bucket of all has no neighbour"
    assert edges == sorted(edges)
    assert len(edges) == len(counts)
    assert max(values) <= edges[-1] or max(values) > bucket_edges()[-1]


def test_nothing_has_no_buckets_to_draw() -> None:
    assert EMPTY.occupied() == ([], [])
