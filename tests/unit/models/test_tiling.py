"""Larger weights from smaller ones: where each number comes from."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dstrain.base.errors import ConfigError
from dstrain.models.tiling import Sizes, grown, sizes_of, source_layer, tile_index

SMALL = Sizes(layers=2, hidden=4, intermediate=6, head_width=2, vocab=10)
LARGE = Sizes(layers=5, hidden=8, intermediate=10, head_width=2, vocab=10)


def test_the_smaller_axis_lies_in_the_middle_and_wraps_around() -> None:
    assert tile_index(4, 8).tolist() == [2, 3, 0, 1, 2, 3, 0, 1]
    assert tile_index(4, 5).tolist() == [0, 1, 2, 3, 0]
    assert tile_index(6, 10, unit=3).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3], "heads of 3 stay whole"


@given(small=st.integers(1, 30), more=st.integers(0, 60), unit=st.integers(1, 5))
def test_every_number_is_used_and_the_middle_is_the_smaller_one_itself(small: int, more: int, unit: int) -> None:
    index = tile_index(small, small + more, unit=unit)
    assert sorted(set(index.tolist())) == list(range(small))
    begin = more // 2 // unit * unit
    assert index[begin : begin + small].tolist() == list(range(small))


def test_layers_are_repeated_in_place() -> None:
    assert [source_layer(n, small=2, large=4) for n in range(4)] == [0, 0, 1, 1]
    assert [source_layer(n, small=2, large=5) for n in range(5)] == [0, 0, 0, 1, 1]
    assert [source_layer(n, small=3, large=3) for n in range(3)] == [0, 1, 2]


def grow(name: str, weight: torch.Tensor, shape: tuple[int, ...], **others: torch.Tensor) -> torch.Tensor:
    return grown({name: weight, **others}, {name: shape}, small=SMALL, large=LARGE, source="x")[name]


def test_both_axes_of_a_matrix_are_tiled() -> None:
    small = torch.arange(24.0).view(6, 4)
    large = grow("layers.0.mlp.weight", small, (10, 8))
    assert torch.equal(large, small[tile_index(6, 10)][:, tile_index(4, 8, unit=2)])
    assert torch.equal(large[2:8, 2:6], small), "in the middle"


def test_query_key_and_value_are_tiled_apart() -> None:
    small = torch.stack([torch.full((4,), float(row)) for row in range(12)])
    large = grow("layers.0.attn.Wqkv.weight", small, (24, 8))
    rows = large[:, 0].tolist()
    assert [rows[a : a + 8] for a in (0, 8, 16)] == [
        [2, 3, 0, 1, 2, 3, 0, 1], [6, 7, 4, 5, 6, 7, 4, 5], [10, 11, 8, 9, 10, 11, 8, 9],
    ]  # fmt: skip


def test_gate_and_value_are_tiled_apart() -> None:
    small = torch.arange(12.0)[:, None].expand(12, 4)
    rows = grow("layers.0.mlp.Wi.weight", small, (20, 8))[:, 0]
    assert rows[2:8].tolist() == list(range(6))
    assert rows[12:18].tolist() == list(range(6, 12))


def test_sizes_that_stay_are_kept_and_positions_repeat() -> None:
    assert grow("decoder.bias", torch.arange(10.0), (10,)).tolist() == list(range(10))
    positions = grow("position_embeddings.weight", torch.arange(3.0)[:, None].expand(3, 4), (7, 8))
    assert positions[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_layer_starts_from_the_one_at_its_depth_and_a_norm_without_a_source_is_left_out() -> None:
    weights = {f"layers.{n}.w": torch.full((4,), float(n)) for n in range(2)}
    weights["layers.1.norm.weight"] = torch.ones(4)
    shapes: dict[str, tuple[int, ...]] = {f"layers.{n}.w": (8,) for n in range(5)}
    shapes |= {f"layers.{n}.norm.weight": (8,) for n in range(1, 5)}
    found = grown(weights, shapes, small=SMALL, large=LARGE, source="x")
    assert [float(found[f"layers.{n}.w"][0]) for n in range(5)] == [0, 0, 0, 1, 1]
    assert sorted(name for name in found if "norm" in name) == ["layers.3.norm.weight", "layers.4.norm.weight"]


@pytest.mark.parametrize(
    ("weights", "shapes", "large", "message"),
    [
        ({}, {"a.w": (8, 8)}, LARGE, "has no a.w; both must be of one model_type"),
        ({"w": torch.zeros(4)}, {"w": (4,)}, Sizes(1, 8, 10, 2, 10), r"its layers \(2\) is above this model's \(1\)"),
        (
            {"e": torch.zeros(10, 4)},
            {"e": (12, 8)},
            Sizes(5, 8, 10, 2, 12),
            "its vocabulary has 10 entries, this model's 12",
        ),
        ({"w": torch.zeros(7, 4)}, {"w": (9, 8)}, LARGE, "axis 0 of w grows from 7 to 9, which is no known size"),
    ],
)
def test_what_does_not_fit_is_named(
    weights: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], large: Sizes, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"model.init_from_smaller: x: {message}"):
        grown(weights, shapes, small=SMALL, large=large, source="x")


def test_sizes_under_either_name() -> None:
    bert = {
        "num_hidden_layers": 2,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "vocab_size": 10,
    }
    distilbert = {"n_layers": 2, "dim": 4, "hidden_dim": 6, "n_heads": 2, "vocab_size": 10}
    assert sizes_of(bert) == sizes_of(distilbert) == SMALL
