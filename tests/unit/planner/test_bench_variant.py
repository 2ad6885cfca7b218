"""The objectives of the variants before the last savers: the same loss by other ways."""

from __future__ import annotations

import pytest
import torch

from dstrain.objectives.mlm import MlmObjective
from dstrain.planner.bench_variant import LogitsObjective
from tests.support.tiny_models import documents, packed, tiny_model


@pytest.mark.parametrize("every_token", [True, False])
def test_logits_give_the_loss_and_gradients_of_the_head(every_token: bool) -> None:
    model = tiny_model("bert")
    batch = packed(documents(), targets=torch.arange(0, 60, 7))
    results = []
    for objective in (MlmObjective(), LogitsObjective(every_token=every_token)):
        parts = objective.loss(model, batch)
        parts.loss_sum.backward()
        results.append((parts, model.model.get_output_embeddings().weight.grad.clone()))
        model.zero_grad()
    (one, gradient), (other, other_gradient) = results
    torch.testing.assert_close(one.loss_sum, other.loss_sum)
    assert one.correct == other.correct
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-5)
