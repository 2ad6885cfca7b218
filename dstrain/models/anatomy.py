"""What a model is made of, counted exactly: parameters, matrix products, and what autograd keeps of each layer.

Pure data and a walk over a model's modules; a model on the meta device is enough, so a billion parameters are counted without
memory. Knows no device, no batch and no library besides torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn


@dataclass(frozen=True)
class Product:
    """A matrix product that every token of its place goes through: (tokens, inputs) × (inputs, outputs)."""

    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Elements of the matrix; two operations each and token."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Anatomy:
    """A masked-LM encoder, by numbers."""

    family: str
    """transformers' model_type."""
    layers: int
    """Layers that a token passes; more than are stored where they share weights (ALBERT)."""
    hidden: int
    """Width d of the residual stream."""
    intermediate: int
    """Inner width f of the feed-forward part."""
    heads: int
    vocab: int
    """Rows of the embedding, padding included."""
    gated: bool
    """Whether the feed-forward part has a third matrix."""
    tensors: tuple[tuple[int, bool], ...]
    """(elements, has two dimensions or more) of each trainable parameter, tied ones once, in the model's order."""
    layer_products: tuple[Product, ...]
    """Of one layer."""
    head_products: tuple[Product, ...]
    """Of the masked-LM head, run on scored tokens only."""
    window: int | None
    """Tokens that a local layer lets a token see; None where every layer sees the whole document."""
    local_layers: int
    """Layers with that window."""
    dropout: float
    """Probability on hidden states; 0 keeps nothing for it."""
    composed_activation: bool = False
    """Whether the activation is composed of Python operations (gelu_new), each of which keeps its input."""
    quadratic: bool = False
    """Whether attention keeps its weights, length × length for each head: models outside the attention interface."""
    layer_matrices: int = 0
    """Elements of the stored layers' matrices: those that Muon treats."""
    scores_at_head: bool = True
    """Whether the loss is made inside the head, a chunk at a time, so that logits of all targets never exist."""

    @cached_property
    def parameters(self) -> int:
        """All trainable parameters."""
        return sum(elements for elements, _ in self.tensors)

    @property
    def groups(self) -> tuple[int, ...]:
        """Elements of the optimizer's groups as `optim.adamw` makes them: decayed, not decayed; empty ones left out."""
        decayed = sum(elements for elements, is_matrix in self.tensors if is_matrix)
        return tuple(n for n in (decayed, self.parameters - decayed) if n)

    @property
    def kept_elements(self) -> int:
        """Activation elements that autograd keeps of one token in one layer, in the compute type.

        tests/unit/models/test_anatomy.py compares with what autograd really keeps.

        Post-norm (BERT's order): input, q, k, v, attention output, two sums before the norms, the first norm's output, and the
        feed-forward part before and behind its activation. Pre-norm with a gate (ModernBERT): two sums, two norm outputs, q, k
        and v as projected, v again, q and k as rotated, attention output, and four widths of the feed-forward part.
        """
        composed = 3 * self.intermediate if self.composed_activation else 0
        if self.gated:
            return 10 * self.hidden + 4 * self.intermediate + composed
        return 8 * self.hidden + 2 * self.intermediate + composed

    def mean_context(self, context: float) -> float:
        """Tokens a token attends to, averaged over layers.

        Args:
            context: the same where a layer sees whole documents.
        """
        if self.window is None:
            return context
        return (
            self.local_layers * min(context, self.window) + (self.layers - self.local_layers) * context
        ) / self.layers


def anatomy_of(model: nn.Module, base: nn.Module, sizes: Sizes, *, scores_at_head: bool) -> Anatomy:
    """Count a model.

    Args:
        model: a `...ForMaskedLM`, on any device.
        base: its encoder, without the head.
        sizes: what the configuration says.
        scores_at_head: whether its loss is made inside the head.
    """
    stack = _layer_stack(base)
    layers = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    repeats = max(1, len(stack)) if stack is not None else 1
    inside = list(_products(stack.modules())) if stack is not None else []
    in_stack = {id(m) for part in layers for m in part.modules()}
    outside = (m for m in model.modules() if id(m) not in in_stack)
    encoder = {id(m) for m in base.modules()}
    head = [product for m in outside if id(m) not in encoder for product in _products([m])]
    per_layer = len(inside) // repeats if inside else 0
    return Anatomy(
        family=sizes.family, layers=sizes.layers, hidden=sizes.hidden, intermediate=sizes.intermediate, heads=sizes.heads,
        vocab=sizes.vocab, gated=sizes.gated,
        tensors=tuple((p.numel(), p.ndim >= 2) for p in model.parameters() if p.requires_grad),
        layer_products=tuple(inside[-per_layer:] if per_layer else ()), head_products=tuple(head),
        window=sizes.window, local_layers=sizes.local_layers, dropout=sizes.dropout,
        composed_activation=sizes.composed_activation, quadratic=sizes.quadratic,
        layer_matrices=sum(p.numel() for p in stack.parameters() if p.ndim == 2) if stack is not None else 0,
        scores_at_head=scores_at_head,
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What a model's configuration says and its modules do not."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    gated: bool
    window: int | None = None
    local_layers: int = 0
    dropout: float = 0.0
    composed_activation: bool = False
    quadratic: bool = False


def _layer_stack(base: nn.Module) -> nn.ModuleList | None:
    """The outermost list of layers with most parameters."""
    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda s: sum(p.numel() for p in s.parameters()), default=None)


def _products(modules: Iterable[nn.Module]) -> Iterable[Product]:
    for module in modules:
        if isinstance(module, nn.Linear):
            yield Product(module.in_features, module.out_features)
