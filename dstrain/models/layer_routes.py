"""Routes past an encoder's layers: tokens or whole layers that training does without.

The layers' forwards are wrapped in place, in training only; names of parameters, and what evaluation and export compute, stay
as they are. Works on dstrain's encoder and on unpadded Hugging Face encoders whose layers form one plain list. What is left
out is decided by `token_dropping` and `layer_dropping`. Compiled layers keep their graphs: the route lies outside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import MicroBatch
from dstrain.base.seeds import derive
from dstrain.models.attention import SegmentLayout, segment_layout
from dstrain.models.blocks import encoder_blocks
from dstrain.models.inputs import plain_batch, segment_numbers
from dstrain.models.layer_dropping import LayerDroppingConfig, kept_layers
from dstrain.models.token_dropping import (
    TokenDroppingConfig,
    filling,
    first_places,
    kept_lengths,
    kept_tokens,
    segment_keys,
    share_at,
)

_PROBE = 1e3  # far above anything a layer adds


@dataclass(frozen=True)
class _Chosen:
    """What is the same for all layers of one forward."""

    positions: Tensor
    segments: Tensor
    keys: Tensor
    places: Tensor
    layout: SegmentLayout
    filled: int
    """Tokens added to what stays, so that compiled layers see few shapes; segments of their own."""


class LayerRoutes:
    """Decides for each layer of a forward which tokens it sees, or whether it is called at all."""

    def __init__(
        self, model: nn.Module, *, tokens: TokenDroppingConfig | None, layers: LayerDroppingConfig | None, seed: int,
        few_shapes: bool = False,
    ) -> None:  # fmt: skip
        """Wrap the layers of a model; nothing is left out before `begin` is called.

        Args:
            model: a MaskedLanguageModel, or dstrain's.
            tokens: settings of token dropping, or None.
            layers: settings of layer dropping, or None.
            seed: of the run.
            few_shapes: fill up what stays to few sizes, for compiled layers.

        Raises:
            ConfigError: the model is padded, its layers are no plain list, or layers may not be left out of it.
        """
        self._model, self._few_shapes = model, few_shapes
        self._tokens, self._layers, self._seed = tokens, layers, seed
        key = "token_dropping" if tokens is not None else "layer_dropping"
        stack = find_stack(model, key=key)
        if layers is not None:
            _require_residual_stream(model, stack)
        self._step: int | None = None
        self._batch: MicroBatch | None = None
        self._chosen: _Chosen | None = None
        self._kept: list[float | None] = [1.0] * len(stack)
        self._middle = range(tokens.full_first, len(stack) - tokens.full_last) if tokens is not None else range(0)
        if tokens is not None and not self._middle:
            raise ConfigError(
                f"token_dropping: full_first={tokens.full_first} and full_last={tokens.full_last} leave none of {len(stack)} layers"
            )
        model.register_forward_pre_hook(self._see)
        for number, layer in enumerate(stack):
            layer.forward = self._routed(number, layer, layer.forward)

    def begin(self, step: int) -> None:
        """A training step begins; `step` counts optimizer steps done."""
        self._step = step
        if self._layers is not None:
            self._kept = kept_layers(self._layers, seed=self._seed, step=step, num_layers=len(self._kept))

    def layer_shares(self, step: int) -> list[float]:
        """Of each layer, the share of a segment's tokens that it sees at a step; 0 for a layer that is left out."""
        number = len(self._kept)
        kept = kept_layers(self._layers, seed=self._seed, step=step, num_layers=number) if self._layers else self._kept
        share = share_at(self._tokens, step) if self._tokens is not None else 1.0
        return [0.0 if chance is None else share if layer in self._middle else 1.0 for layer, chance in enumerate(kept)]

    def _see(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._batch, self._chosen = args[0], None

    def _routed(self, number: int, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward with its route; only `forward` itself is ever compiled."""

        def routed(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not layer.training or self._step is None:
                return forward(hidden, *args, **kwargs)
            if self._kept[number] is None:
                return self._pass_by(hidden, layer)
            index, args, kwargs = self._enter(number, hidden, args, kwargs)
            return self._leave(number, hidden, index, forward(*args, **kwargs))

        return cast("Callable[..., Any]", torch.compiler.disable(routed, recursive=False))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pass_by(self, hidden: Tensor, layer: nn.Module) -> Tensor:
        return hidden + _nothing(layer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, tuple[Any, ...], dict[str, Any]]:
        """Which tokens a layer sees (None for all), and its arguments for them."""
        index = self._index(number, hidden)
        if index is None:
            return None, (hidden, *args), kwargs
        assert self._chosen is not None
        dim = hidden.dim() - 2
        some = _Select(nn.functional.pad(index, (0, self._chosen.filled)), hidden.shape[dim], dim, self._chosen.layout)
        return index, tuple(some(a) for a in (hidden, *args)), {name: some(value) for name, value in kwargs.items()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, number: int, hidden: Tensor, index: Tensor | None, out: Tensor) -> Tensor:
        """What the layer made of its tokens, among those that passed it by."""
        dim, chance = hidden.dim() - 2, self._kept[number]
        if index is not None:
            out = hidden.index_copy(dim, index, out.narrow(dim, 0, len(index)))
        return out if chance in (1.0, None) else hidden + (out - hidden) / chance

    def _index(self, number: int, hidden: Tensor) -> Tensor | None:
        """(K,) tokens that a layer sees; None for all."""
        if self._tokens is None or number not in self._middle or self._batch is None or self._step is None:
            return None
        share = share_at(self._tokens, self._step)
        if share == 1.0:
            return None
        if self._chosen is None:
            self._chosen = _choose(self._batch, share, kernel=str(self._model.kernel), few_shapes=self._few_shapes)
        chosen, salt = self._chosen, derive(self._seed, "token_dropping", self._step, number)
        return kept_tokens(chosen.keys, chosen.positions, chosen.segments, places=chosen.places, salt=salt)


def _choose(batch: MicroBatch, share: float, *, kernel: str, few_shapes: bool) -> _Chosen:
    device = batch.tokens.device
    segments = segment_numbers(batch.lengths, device)
    kept = kept_lengths(batch.lengths, share)
    fill = filling(kept, of=len(batch.tokens)) if few_shapes else ()
    return _Chosen(
        positions=batch.positions,
        segments=segments,
        keys=segment_keys(batch.tokens, batch.positions, segments, len(batch.lengths)),
        places=first_places(batch.lengths, kept, device=device),
        layout=segment_layout((*kept, *fill), device=device, kernel=kernel),
        filled=sum(fill),
    )


@dataclass(frozen=True)
class _Select:
    """Everything that a layer is given for T tokens, for some of them."""

    index: Tensor
    size: int
    dim: int
    layout: SegmentLayout

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > self.dim and value.shape[self.dim] == self.size:
            return value.index_select(self.dim, self.index)
        if isinstance(value, tuple):  # a cosine and a sine for each token
            return tuple(self(v) for v in value)
        return self.layout if isinstance(value, SegmentLayout) else value


def _nothing(layer: nn.Module) -> Tensor:
    """A zero that every parameter of a layer takes part in.

    A layer that is left out then has a gradient of zeros, like one whose gradient is lost in rounding, at every ZeRO stage: no
    gradient at all would stop its moments at some stages and not at others.
    """
    return torch.stack([p.reshape(-1)[0] for p in layer.parameters() if p.requires_grad]).sum() * 0.0


def find_stack(model: nn.Module, *, key: str) -> list[nn.Module]:
    """The layers of a wrapped encoder, in order.

    Args:
        model: a MaskedLanguageModel.
        key: section of the configuration, for messages.

    Raises:
        ConfigError: the model is padded, or its layers are not one plain list.
    """
    if model.attention != "unpadded":
        raise ConfigError(f"{key}: needs unpadded attention, and this model is padded: {model.attention_reason}")
    inner: Any = model.model
    wanted = getattr(inner.config, "num_hidden_layers", None)
    stack = encoder_blocks(inner)
    if len(stack) != wanted:
        raise ConfigError(
            f"{key}: {type(inner).__name__} has no one list of its {wanted} layers (they may be shared, as ALBERT's are): "
            "leave the section out"
        )
    return stack


@torch.no_grad()
def _require_residual_stream(model: nn.Module, stack: list[nn.Module]) -> None:
    """Refuse models whose layers normalise what passes by them: leaving one out would change the scale of everything after.

    A layer with a residual stream hands a huge input on nearly as it is; one that normalises its sum does not.
    """
    seen: list[float] = []

    def huge(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * _PROBE, *args[1:])

    def compare(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(float((output - args[0]).norm() / args[0].norm()))

    hooks = [stack[0].register_forward_pre_hook(huge), stack[0].register_forward_hook(compare)]
    training = model.training
    try:
        model.eval()
        inner: Any = model.model
        model(plain_batch(torch.arange(7) % int(inner.config.vocab_size), (4, 3)))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not seen or not seen[0] < 0.5:
        raise ConfigError(
            f"layer_dropping: the layers of {type(model.model).__name__} normalise their sum (post-norm), so none can be left "
            "out; take a pre-norm encoder (kind: dstrain-encoder, or modernbert)"
        )
