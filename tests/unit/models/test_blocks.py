"""Blocks of every family are found, compiled once for all layers and all batches of one shape, and compute the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dstrain.models.blocks import compile_blocks, encoder_blocks, num_graphs
from tests.support.tiny_models import FAMILIES, documents, packed, tiny_encoder, tiny_model

NUM_LAYERS = {"modernbert": 3, "albert": 1}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_layers_of_every_family_are_found(family: str) -> None:
    assert len(encoder_blocks(tiny_model(family).model)) == NUM_LAYERS.get(family, 2)


def test_a_model_without_layers_has_no_blocks() -> None:
    assert encoder_blocks(torch.nn.Linear(2, 2)) == []
    assert compile_blocks(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("family", ["bert", "modernbert", "dstrain-encoder"])
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_all_documents(family: str) -> None:
    torch._dynamo.reset()
    model = tiny_encoder() if family == "dstrain-encoder" else tiny_model(family)
    batches = [packed(documents(lengths, seed=1)) for lengths in ((20, 20, 10), (30, 11, 9), (49, 1))]
    plain, gradients = [], []
    for batch in batches:
        plain.append(model(batch))
        plain[-1].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    compile_blocks(model.model, backend="aot_eager")
    before, after_first = num_graphs(), 0
    for batch, logits, expected in zip(batches, plain, gradients):
        found = model(batch)
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
        found.square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)
        model.zero_grad()
        after_first = after_first or num_graphs()
    assert after_first > before
    assert num_graphs() == after_first, "a batch of the same size with other documents was compiled again"


def test_every_shape_of_a_long_schedule_is_compiled() -> None:
    """Of torch's own accord blocks are run uncompiled from the eighth graph on."""
    torch._dynamo.reset()
    model = tiny_encoder()
    compile_blocks(model.model, backend="eager")
    graphs = []
    for length in range(20, 40):
        model(packed(documents((length,))))
        graphs.append(num_graphs())
    assert all(later > earlier for earlier, later in pairwise(graphs))
