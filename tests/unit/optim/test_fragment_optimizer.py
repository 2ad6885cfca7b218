"""Optimizers that need whole parameters, driven by DeepSpeed in this process: every stage gives the same weights.

Worlds of several ranks are crossed in tests/dist/test_optimizers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ConfigError
from dstrain.checkpoint.manifest import MASTER
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import MuonConfig, OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import Engine
from tests.support.tiny_models import documents, packed, step_data, tiny_model

KINDS = pytest.mark.parametrize("kind", ["stable_adamw", "lamb", "muon"])
FAMILIES = {"stable_adamw": "bert", "lamb": "bert", "muon": "modernbert"}


def build(control: ControlPlane, kind: str, *, stage: int, precision: str = "fp32", raw: Any = None) -> Engine:
    config = OptimizerConfig(kind=kind, weight_decay=0.1)  # type: ignore[arg-type]
    if kind == "muon":
        config = OptimizerConfig(kind="muon", weight_decay=0.1, muon=MuonConfig(learning_rate=2 * config.learning_rate))
    return Engine(
        tiny_model(FAMILIES[kind]), MlmObjective(), config=EngineConfig(zero_stage=stage, bucket_elements=10_000),  # type: ignore[arg-type]
        optimizer=config, control=control, device="cpu", precision=precision, micro_batch=4, accumulation=2, seed=0,  # type: ignore[arg-type]
        raw=raw,
    )  # fmt: skip


def train(engine: Engine, *, steps: int = 4, rate: float = 2e-2, judge: Any = None) -> list[float]:
    texts = [(documents((9, 5), seed=2 * n), documents((7, 4), seed=2 * n + 1)) for n in range(steps)]
    data = [step_data([packed(one), packed(other)]) for one, other in texts]
    return [engine.train_step(data[n], step=n, learning_rate=rate, judge=judge).loss for n in range(steps)]


def held(engine: Engine) -> dict[tuple[str, str], Tensor]:
    return {(f.name, f.state): f.tensor.clone() for f in engine.fragments.held()}


@KINDS
def test_all_stages_give_the_same_weights_and_state(control: ControlPlane, kind: str) -> None:
    found = {}
    for stage in (0, 1, 2, 3):
        engine = build(control, kind, stage=stage)
        before = {key: t for key, t in held(engine).items() if key[1] == MASTER}
        losses = train(engine)
        found[stage] = held(engine)
        assert losses[-1] < losses[0]
        assert engine.fragments.optimizer_step() == 4
        used = [key for key, t in before.items() if not torch.equal(t, found[stage][key])]
        assert len(used) == len(before)
    for stage in (1, 2, 3):
        assert found[stage].keys() == found[0].keys()
        for key, tensor in found[stage].items():
            if key[0].endswith("key.bias"):  # softmax does not see it: its gradient is rounding noise
                continue
            torch.testing.assert_close(tensor, found[0][key], rtol=2e-3, atol=2e-5, msg=str((stage, key)))


@KINDS
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_learns(control: ControlPlane, kind: str, stage: int) -> None:
    losses = train(build(control, kind, stage=stage, precision="bf16"), steps=6)
    assert losses[-1] < losses[0] - 0.1


@KINDS
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_an_update_that_the_judge_refuses_leaves_every_byte(
    control: ControlPlane, kind: str, stage: int, precision: str
) -> None:
    engine = build(control, kind, stage=stage, precision=precision)
    train(engine, steps=1)
    before = held(engine)
    train(engine, steps=1, judge=lambda **_: False)
    after = held(engine)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert engine.fragments.optimizer_step() == 1


def test_muon_keeps_a_momentum_for_matrices_and_adams_moments_for_the_rest(control: ControlPlane) -> None:
    engine = build(control, "muon", stage=1)
    moments = engine.fragments.moments
    assert moments["model.layers.0.attn.Wqkv.weight"] == ("momentum_buffer",)
    assert moments["model.embeddings.tok_embeddings.weight"] == ("exp_avg", "exp_avg_sq")
    assert {(f.name, f.state) for f in engine.fragments.held()} == {
        (name, state) for name, some in moments.items() for state in (MASTER, *some)
    }


def test_muons_own_rate_moves_its_matrices_alone(control: ControlPlane) -> None:
    engine = build(control, "muon", stage=1)
    train(engine, steps=1, rate=1e-2)
    assert sorted(group["lr"] for group in engine.engine.optimizer.param_groups) == [1e-2, 1e-2, 2e-2]


@KINDS
def test_partitions_on_the_host_are_refused(control: ControlPlane, kind: str) -> None:
    raw = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=f"optimizer.kind: {kind} does not go with .*offload_optimizer"):
        build(control, kind, stage=1, raw=raw)
