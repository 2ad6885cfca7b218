"""Weights of a larger encoder from a smaller one of the same family: matrices tiled from the middle, layers repeated in place.

ModernBERT-large began so from ModernBERT-base (arXiv 2412.13663, section 2.2): the smaller matrix lies in the middle of the
larger one, whose borders are filled with it wrapped around, and each layer starts from the layer at the same relative depth
(arXiv 2112.11446, appendix G.3.3). Parts of fused matrices (query, key, value; gate and value) are tiled one by one. Knows sizes and
names of parameters, no library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dstrain.base.errors import ConfigError

_NUMBERED = re.compile(r"^(?P<stack>.*?\.)(?P<number>\d+)(?P<rest>\..*)$")


@dataclass(frozen=True)
class Sizes:
    """Of one encoder."""

    layers: int
    hidden: int
    intermediate: int
    head_width: int
    vocab: int


def sizes_of(architecture: Mapping[str, Any]) -> Sizes:
    """Sizes in a transformers configuration, under any of the names that encoders use."""

    def field(*names: str) -> int:
        return next((int(architecture[name]) for name in names if architecture.get(name)), 0)

    hidden = field("hidden_size", "dim")
    return Sizes(
        layers=field("num_hidden_layers", "n_layers"),
        hidden=hidden,
        intermediate=field("intermediate_size", "hidden_dim"),
        head_width=hidden // max(1, field("num_attention_heads", "n_heads")),
        vocab=field("vocab_size"),
    )


def tile_index(small: int, large: int, *, unit: int = 1) -> Tensor:
    """(large,) indices into the smaller axis: it lies in the middle, and the borders wrap around.

    Args:
        small: size of the smaller axis.
        large: size of the larger one.
        unit: the middle begins at a multiple of this, so that attention heads stay whole.
    """
    border = (large - small) // 2 // unit * unit
    return (torch.arange(large) - border) % small


def source_layer(number: int, *, small: int, large: int) -> int:
    """The smaller model's layer that a layer starts from: x, y becomes x, x, y, y."""
    return number * small // large


def grown(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, small: Sizes, large: Sizes, source: str
) -> dict[str, Tensor]:  # fmt: skip
    """Weights for the larger encoder.

    Args:
        weights: of the smaller one, by name.
        shapes: of the larger one's parameters, by name.
        small: sizes of the smaller one.
        large: sizes of the larger one.
        source: named in errors.

    Returns:
        One tensor for every parameter that has a counterpart; parameters of one dimension without one (a norm that the
        first layer does without) are left out.

    Raises:
        ConfigError: the larger one is smaller somewhere, or a parameter has no counterpart.
    """
    for name in ("layers", "hidden", "intermediate"):
        ours, theirs = getattr(large, name), getattr(small, name)
        if ours < theirs:
            raise ConfigError(
                f"model.init_from_smaller: {source}: its {name} ({theirs}) is above this model's ({ours})"
            )
    found = {}
    for name, shape in shapes.items():
        theirs_name = _counterpart(name, small=small, large=large)
        weight = weights.get(theirs_name)
        if weight is None:
            if len(shape) == 1:
                continue
            raise ConfigError(
                f"model.init_from_smaller: {source}: has no {theirs_name}; both must be of one model_type"
            )
        for axis, size in enumerate(shape):
            weight = _tiled(weight, axis, size, name=name, small=small, large=large, source=source)
        found[name] = weight
    return found


def _counterpart(name: str, *, small: Sizes, large: Sizes) -> str:
    match = _NUMBERED.match(name)
    if match is None:
        return name
    number = source_layer(int(match["number"]), small=small.layers, large=large.layers)
    return f"{match['stack']}{number}{match['rest']}"


def _tiled(
    weight: Tensor, axis: int, size: int, *, name: str, small: Sizes, large: Sizes, source: str
) -> Tensor:  # fmt: skip
    """One axis at its new size."""
    pair = (weight.shape[axis], size)
    unit = small.head_width if small.head_width == large.head_width else 1
    blocks = [
        (3, (small.hidden, large.hidden), unit),
        (2, (small.intermediate, large.intermediate), 1),
        (1, (small.hidden, large.hidden), unit),
        (1, (small.intermediate, large.intermediate), 1),
    ]
    for count, (theirs, ours), step in blocks:
        if pair == (count * theirs, count * ours) and (count != 3 or "qkv" in name.lower()):
            index = tile_index(theirs, ours, unit=step)
            return weight.index_select(axis, torch.cat([index + part * theirs for part in range(count)]))
    if pair[0] == pair[1]:
        return weight
    if pair == (small.vocab, large.vocab):
        raise ConfigError(
            f"model.init_from_smaller: {source}: its vocabulary has {pair[0]} entries, this model's {pair[1]}: "
            "use the same tokenizer and model.pad_vocab_to"
        )
    if axis == 0 and pair[1] > pair[0] and "position" in name:
        return weight.index_select(0, torch.arange(pair[1]) % pair[0])
    raise ConfigError(
        f"model.init_from_smaller: {source}: axis {axis} of {name} grows from {pair[0]} to {pair[1]}, which is no known size"
    )
