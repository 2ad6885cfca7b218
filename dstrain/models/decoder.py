"""The last matrix of a masked-LM model, able to hand its input to a loss instead of multiplying it out.

Works for every model whose output embedding is a plain `nn.Linear` that its forward pass calls as a module and whose result
becomes the logits as it is. That is tried out once, on one token; other models keep their logits. The loss is computed inside
the module's own forward, where ZeRO stage 3 has its weights gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dstrain.base.protocols import HeadLoss


@dataclass
class Scored:
    """What a loss found besides itself."""

    hits: Tensor = field(default_factory=lambda: torch.zeros(()))
    """() float32 right guesses; set by the forward pass."""


class ScoringDecoder:
    """Takes the place of one linear module's forward."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._loss: HeadLoss | None = None
        self._scored = Scored()
        linear.forward = self._forward  # type: ignore[method-assign]

    @classmethod
    def of(cls, model: Any) -> ScoringDecoder | None:
        """Take over a masked-LM model's output matrix; None where its logits do not come straight from one."""
        linear = model.get_output_embeddings()
        if type(linear) is not nn.Linear or not _makes_the_logits(model, linear):
            return None
        return cls(linear)

    @contextmanager
    def scoring(self, loss: HeadLoss) -> Iterator[Scored]:
        """Within, the module returns () losses as (1, 1, 1) logits."""
        self._loss, self._scored = loss, Scored()
        try:
            yield self._scored
        finally:
            self._loss = None

    def _forward(self, input: Tensor) -> Tensor:
        if self._loss is None:
            return functional.linear(input, self._linear.weight, self._linear.bias)
        states = input.reshape(-1, input.shape[-1])
        total, self._scored.hits = self._loss(states, self._linear.weight, self._linear.bias)
        return total.reshape(1, 1, 1)


@torch.no_grad()
def _makes_the_logits(model: Any, linear: nn.Linear) -> bool:
    """Whether the model's logits are this module's result, seen on two tokens."""
    results: list[Tensor] = []
    hook = linear.register_forward_hook(lambda _, __, output: results.append(output))
    training = model.training
    model.eval()
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        logits = model(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits
    except (RuntimeError, ValueError, IndexError, TypeError):  # a model with needs of its own keeps its logits
        return False
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
        hook.remove()
    return len(results) == 1 and results[0].shape == logits.shape and torch.equal(results[0], logits)
