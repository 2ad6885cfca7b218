"""Every measurement runs on this CPU and gives a sane number; how fast the machine is does not matter here."""

from __future__ import annotations

import pytest
import torch

from dstrain.base.errors import ConfigError
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import anatomy_without_weights
from dstrain.planner import probe as probing
from dstrain.planner.probe import Clock, Measured, measure_attention, measure_bandwidth, measure_products, probe
from dstrain.train.ds_config import EngineConfig
from tests.support.tiny_models import FAMILIES, VOCABULARY

CONFIG = ModelConfig(config={"model_type": "bert", **FAMILIES["bert"]})
ANATOMY = anatomy_without_weights(CONFIG, vocab_size=VOCABULARY)
CLOCK = Clock("cpu", limit_s=0.0)


def test_products_attention_and_bandwidth_are_measured() -> None:
    products = measure_products([(64, 32, 16), (128, 64, 64)], device="cpu", precision="fp32", clock=CLOCK)
    assert [(p.tokens, p.inputs, p.outputs) for p in products] == [(64, 32, 16), (128, 64, 64)]
    attention = measure_attention([16, 64], tokens=128, heads=2, width=16, device="cpu", precision="fp32", clock=CLOCK)
    assert [a.length for a in attention] == [16, 64]
    bandwidth = measure_bandwidth(device="cpu", precision="fp32", num_bytes=1 << 20, clock=CLOCK)
    assert all(1e5 < rate < 1e15 for rate in [*(p.flops for p in products), *(a.flops for a in attention), bandwidth])


def small_probe(**more: object) -> Measured:
    return probe(
        CONFIG, EngineConfig(), ANATOMY, sequence_length=32, mask_rate=0.3, device="cpu", precision="fp32", limit_s=0.0, **more  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_probe_measures_the_model_at_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_step_rows", lambda length, on_gpu: (2, 8))
    found = small_probe()
    assert [(s.rows, s.tokens) for s in found.steps] == [(2, 64), (8, 256)]
    assert [s.scored for s in found.steps] == [19, 77]
    assert all(s.seconds > 0 for s in found.steps)
    assert found.device == "cpu"
    assert found.memory_bytes > 1 << 28


def test_sizes_that_do_not_fit_end_the_probe_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probing.MlmObjective, "loss", full)
    with pytest.raises(ConfigError, match=r"--probe: not two micro-batches of the model fit"):
        small_probe()


def test_the_clock_takes_the_median_of_what_it_ran() -> None:
    runs: list[int] = []
    assert Clock("cpu", limit_s=0.0).median(lambda: runs.append(1)) >= 0
    assert len(runs) == 1 + 3


def test_two_micro_batches_differ_whatever_the_row() -> None:
    for length in (8, 512, 4096, 65536):
        for on_gpu in (True, False):
            small, large = probing._step_rows(length, on_gpu=on_gpu)
            assert 1 <= small < large
