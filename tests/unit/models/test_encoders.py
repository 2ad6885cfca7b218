"""Encoders on a GPU that is not there: forward and backward leave the host free, mix no devices and no types.

What they compute is compared with transformers' answers in test_huggingface.py and test_dstrain_encoder.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dstrain.base.device import sent
from dstrain.base.protocols import MicroBatch, Objective
from dstrain.models.encoders import SequenceClassifier
from dstrain.models.layer_dropping import LayerDroppingConfig
from dstrain.models.layer_routes import LayerRoutes
from dstrain.models.token_dropping import TokenDroppingConfig
from dstrain.objectives.mlm import MlmObjective
from dstrain.objectives.supervised import ClassificationObjective, RegressionObjective
from dstrain.train.compiling import few_shapes
from dstrain.train.device_feed import compact, spelled_out
from tests.support.fake_gpu import GPU, fake_gpu, moved
from tests.support.tiny_models import FAMILIES, UNPADDED, documents, packed, tiny_encoder, tiny_model

LENGTHS = (9, 9, 4)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "dstrain": tiny_encoder,
    **{family: lambda family=family: tiny_model(family) for family in UNPADDED},  # type: ignore[misc]
}
TOKENS = TokenDroppingConfig(steps=10, full_last=0)


def on_gpu(batch: MicroBatch) -> MicroBatch:
    """As `DeviceFeed` sends it."""
    small = compact(batch)
    tensors = {
        name: None if (tensor := getattr(small, name)) is None else sent(tensor, "cuda")
        for name in ("tokens", "positions", "targets", "labels", "token_types")
    }
    return spelled_out(dataclasses.replace(small, **tensors))


def train(
    model: nn.Module, objective: Objective, batch: MicroBatch, *, dtype: torch.dtype = torch.bfloat16, kernel: str = "sdpa",
    routes: LayerRoutes | None = None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Gradients of a training step's forward and backward."""
    model.kernel = kernel  # type: ignore[assignment]
    moved(model, dtype).train()
    with fake_gpu():
        if routes is not None:
            routes.begin(3)
        parts = objective.loss(model, on_gpu(batch))
        assert parts.loss_sum.device == parts.correct.device == GPU
        (parts.loss_sum * 0.5).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters()}


def text() -> MicroBatch:
    return packed(documents(LENGTHS), targets=torch.arange(0, sum(LENGTHS), 3))


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_language_model_never_waits(name: str) -> None:
    gradients = train(MODELS[name](), MlmObjective(), text())
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert {gradient.dtype for gradient in gradients.values() if gradient is not None} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "dtype"), [("dstrain", torch.float16), ("bert", torch.float32)])
def test_in_other_precisions_neither(name: str, dtype: torch.dtype) -> None:
    gradients = train(MODELS[name](), MlmObjective(), text(), dtype=dtype)
    assert {gradient.dtype for gradient in gradients.values() if gradient is not None} == {dtype}


@pytest.mark.parametrize("name", ["dstrain", "modernbert"])
def test_through_torchs_varlen_kernel_neither(name: str) -> None:
    gradients = train(MODELS[name](), MlmObjective(), text(), kernel="varlen")
    assert [name for name, gradient in gradients.items() if gradient is None] == []


@pytest.mark.parametrize(("name", "shaped"), [("dstrain", True), ("bert", False)])
def test_with_tokens_dropped_neither(name: str, shaped: bool) -> None:
    batch = few_shapes(text(), usual_tokens=sum(LENGTHS)) if shaped else text()
    model = MODELS[name]()
    train(model, MlmObjective(), batch, routes=LayerRoutes(model, tokens=TOKENS, layers=None, seed=0, few_shapes=shaped))  # fmt: skip


def test_with_layers_dropped_neither() -> None:
    model = tiny_encoder()
    layers = LayerDroppingConfig(last_keep=0.01, gamma=10.0)
    train(model, MlmObjective(), text(), routes=LayerRoutes(model, tokens=None, layers=layers, seed=0))


@pytest.mark.parametrize(
    ("family", "objective"), [("bert", RegressionObjective()), ("modernbert", ClassificationObjective())]
)
def test_a_classifier_neither(family: str, objective: Objective) -> None:
    regression = isinstance(objective, RegressionObjective)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    config = AutoConfig.for_model(
        family, vocab_size=64, pad_token_id=1, num_labels=1 if regression else 3, **special, **FAMILIES[family]
    )
    model = SequenceClassifier(AutoModelForSequenceClassification.from_config(config))
    assert model.attention == "unpadded"
    labels = torch.zeros(len(LENGTHS), dtype=torch.float32 if regression else torch.int64)
    train(model, objective, packed(documents(LENGTHS), targets=torch.arange(len(LENGTHS)), labels=labels))


@torch.no_grad()
def test_an_evaluation_neither() -> None:
    model = moved(tiny_encoder(), torch.bfloat16).eval()
    with fake_gpu():
        assert MlmObjective().loss(model, on_gpu(text())).loss_sum.dtype == torch.float32
