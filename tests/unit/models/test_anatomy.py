"""Counts of a model's parts against the model itself and against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.models.anatomy import Anatomy
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import anatomy, anatomy_without_weights, build_masked_lm
from dstrain.monitor.flops import ModelShape, flops_per_token
from tests.support.tiny_models import FAMILIES, SPECIAL, UNPADDED, VOCABULARY, documents, packed, tiny_model

LENGTHS = (32, 32)
TOKENS = sum(LENGTHS)


def counted(family: str, **fields: Any) -> Anatomy:
    config = ModelConfig(config={"model_type": family, **FAMILIES[family], **fields})
    return anatomy_without_weights(config, vocab_size=VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_built_model(family: str) -> None:
    model = tiny_model(family)
    found = counted(family)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sorted(found.groups) == sorted(
        sum(p.numel() for p in model.parameters() if (p.ndim >= 2) is is_matrix) for is_matrix in (True, False)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_built_model_is_counted_like_one_on_the_meta_device(family: str) -> None:
    assert anatomy(tiny_model(family)) == counted(family)


def own_encoder(**fields: Any) -> ModelConfig:
    return ModelConfig(kind="dstrain-encoder", config={**FAMILIES["modernbert"], **fields})


def kept_bytes(family: str, layers: int, **fields: Any) -> int:
    """Bytes of the storages that autograd keeps in a forward, weights left out."""
    count = {"n_layers": layers} if family == "distilbert" else {"num_hidden_layers": layers}
    if family == "dstrain-encoder":
        model: Any = build_masked_lm(own_encoder(**count, **fields), vocab_size=VOCABULARY, special=SPECIAL)
    else:
        model = tiny_model(family, **count, **fields).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(packed(documents(LENGTHS)))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", [*UNPADDED, "dstrain-encoder"])
def test_kept_activations_of_a_layer_are_what_autograd_keeps(family: str) -> None:
    modern = family in ("modernbert", "dstrain-encoder")
    fields = {"global_attn_every_n_layers": 1} if modern else {}  # a window needs a mask on a CPU
    layer = (kept_bytes(family, 4, **fields) - kept_bytes(family, 2, **fields)) // 2
    found = counted("modernbert" if modern else family, **fields)
    statistics = 4 * found.heads + 16
    assert layer == TOKENS * (4 * found.kept_elements + statistics)


def test_products_are_those_of_the_flop_count() -> None:
    config = {
        "model_type": "bert",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    found = anatomy_without_weights(ModelConfig(config=config, pad_vocab_to=1), vocab_size=30522)
    shape = ModelShape(layers=12, hidden=768, intermediate=3072, vocab=30522)
    layers = 6 * found.layers * sum(p.weights for p in found.layer_products)
    head = 6 * sum(p.weights for p in found.head_products)
    assert layers == flops_per_token(shape, mean_context=0, scored_share=0)
    assert layers + head == flops_per_token(shape, mean_context=0, scored_share=1)
    assert found.parameters == 109_514_298  # transformers' BertForMaskedLM of bert-base-uncased


def test_the_own_encoder_is_counted_like_the_one_it_takes_over() -> None:
    model = build_masked_lm(own_encoder(), vocab_size=VOCABULARY, special=SPECIAL)
    assert anatomy(model) == anatomy_without_weights(own_encoder(), vocab_size=VOCABULARY) == counted("modernbert")


def test_shared_layers_are_stored_once_and_passed_often() -> None:
    found = counted("albert", num_hidden_layers=6)
    assert found.layers == 6
    assert found.parameters == counted("albert", num_hidden_layers=2).parameters
    assert len(found.layer_products) == 6


def test_local_layers_see_their_window() -> None:
    found = counted("modernbert", num_hidden_layers=6, global_attn_every_n_layers=3, local_attention=8)
    assert found.local_layers == 4
    assert found.mean_context(50.0) == (4 * 8 + 2 * 50) / 6
    assert found.mean_context(5.0) == 5.0


def test_a_model_outside_the_attention_interface_keeps_its_attention_weights() -> None:
    assert counted("deberta-v2").quadratic
    assert not counted("bert").quadratic
