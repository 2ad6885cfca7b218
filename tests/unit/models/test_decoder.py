"""The vocabulary head that scores instead of multiplying out: which models let it, and that it changes nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from dstrain.models.decoder import ScoringDecoder
from dstrain.models.encoders import MaskedLanguageModel
from dstrain.models.inputs import plain_batch
from tests.support.tiny_models import tiny_model

FAMILIES = ("bert", "roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2")
TOKENS = torch.arange(20) % 11 + 5


def plain_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum().float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_in_the_head_is_the_loss_of_the_logits(family: str) -> None:
    model: MaskedLanguageModel = tiny_model(family).eval()
    batch = plain_batch(TOKENS, (9, 7, 4))
    logits = model(batch)
    assert model.scores_at_head
    loss, hits = model(batch, head_loss=partial(plain_loss, labels=batch.labels))
    torch.testing.assert_close(loss, functional.cross_entropy(logits, batch.labels, reduction="sum"))
    assert hits == (logits.argmax(-1) == batch.labels).sum()
    torch.testing.assert_close(model(batch), logits)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_gradients_reach_every_parameter(family: str) -> None:
    one, other = tiny_model(family).eval(), tiny_model(family).eval()
    other.load_state_dict(one.state_dict())
    batch = plain_batch(TOKENS, (9, 7, 4))
    functional.cross_entropy(one(batch), batch.labels, reduction="sum").backward()
    other(batch, head_loss=partial(plain_loss, labels=batch.labels))[0].backward()
    for (name, left), right in zip(one.named_parameters(), other.parameters()):
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, msg=name)


class _Scaled(nn.Module):
    """A model that changes what its output matrix makes, as some families do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 7)
        self.config = type("Config", (), {"_attn_implementation": "sdpa"})()

    def get_output_embeddings(self) -> nn.Module:
        return self.linear

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(self, input_ids: torch.Tensor) -> object:
        return type("Output", (), {"logits": 2 * self.linear(torch.ones(*input_ids.shape, 4))})()


class _Odd(_Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(4, 7))  # type: ignore[assignment]


@pytest.mark.parametrize("model", [_Scaled(), _Odd()])
def test_models_whose_logits_are_made_otherwise_keep_them(model: _Scaled) -> None:
    assert ScoringDecoder.of(model) is None
    assert model.config._attn_implementation == "sdpa"
