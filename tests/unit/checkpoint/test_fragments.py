"""The fp32 state of an engine in this process; worlds and stages cross in tests/dist/test_checkpoint_matrix.py."""

from __future__ import annotations

import pytest
import torch

from dstrain.base.control import ControlPlane
from dstrain.base.errors import MachineError
from dstrain.checkpoint.fragments import EngineState
from dstrain.checkpoint.manifest import MASTER, MOMENTS
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import PARAMETER_PREFIX, Engine
from tests.support.tiny_models import documents, packed, step_data, tiny_model

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def build(control: ControlPlane, *, stage: int, precision: str) -> tuple[Engine, EngineState, dict[str, torch.Tensor]]:
    model = tiny_model("bert")
    initial = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    engine = Engine(
        model, MlmObjective(), config=EngineConfig(zero_stage=stage, bucket_elements=10_000), optimizer=OptimizerConfig(), control=control,  # type: ignore[arg-type]
        device="cpu", precision=precision, micro_batch=3, accumulation=1, seed=0,  # type: ignore[arg-type]
    )  # fmt: skip
    return engine, EngineState(engine.engine, prefix=PARAMETER_PREFIX), initial


@STAGES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fresh_engine_starts_at_adam_step_zero_with_empty_moments(
    control: ControlPlane, stage: int, precision: str
) -> None:
    _, state, initial = build(control, stage=stage, precision=precision)
    assert state.optimizer_step() == 0
    moments = [f for f in state.held() if f.state in MOMENTS]
    assert len(moments) == 2 * len(initial)
    assert all(not f.tensor.any() for f in moments)
    assert state.shapes == {name: list(p.shape) for name, p in initial.items()}


@STAGES
def test_in_bf16_the_masters_hold_the_exact_initial_weights_and_the_parameters_their_rounding(
    control: ControlPlane, stage: int
) -> None:
    engine, state, initial = build(control, stage=stage, precision="bf16")
    state.fill_masters(initial)
    masters = {f.name: f.tensor for f in state.held() if f.state == MASTER}
    assert masters.keys() == initial.keys()
    for name, weight in initial.items():
        assert torch.equal(masters[name], weight.reshape(-1)), name
        assert not torch.equal(weight.bfloat16().float(), weight) or weight.unique().numel() <= 2, "nothing was rounded"
    if stage != 3:
        own = dict(engine.engine.module.model.model.named_parameters())
        for name, weight in initial.items():
            assert own[name].dtype == torch.bfloat16
            assert torch.equal(own[name], weight.bfloat16()), name


@STAGES
def test_a_step_moves_the_counter_the_masters_and_the_moments(control: ControlPlane, stage: int) -> None:
    engine, state, initial = build(control, stage=stage, precision="fp32")
    data = step_data([packed(documents((9, 5, 3)))])
    engine.train_step(data, step=0, learning_rate=1e-2)
    assert state.optimizer_step() == 1
    held = {(f.name, f.state): f.tensor for f in state.held()}
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(held[name, MASTER], initial[name].reshape(-1))
    assert held[name, "exp_avg"].any()
    assert (held[name, "exp_avg_sq"] >= 0).all()
    state.set_optimizer_step(41)
    assert state.optimizer_step() == 41


@STAGES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_what_is_written_into_the_fragments_is_what_the_model_computes_with(
    control: ControlPlane, stage: int, precision: str, used: bool
) -> None:
    """Fresh as at a resume, used as when the best checkpoint is loaded after training."""
    batch = packed(documents((9, 5, 3)))
    engine, state, initial = build(control, stage=stage, precision=precision)
    state.fill_masters(initial)
    expected = engine.predict([batch])[0]
    other, target, _ = build(control, stage=stage, precision=precision)
    if used:
        other.train_step(step_data([batch]), step=0, learning_rate=0.1)
        assert not torch.allclose(other.predict([batch])[0], expected, atol=1e-2)
    with torch.no_grad():
        for f in target.held():
            if f.state == MASTER:
                f.tensor.copy_(initial[f.name].reshape(-1) * 2)
        target.refresh()
    assert not torch.allclose(other.predict([batch])[0], expected, atol=1e-2)
    target.fill_masters(initial)
    assert torch.equal(other.predict([batch])[0], expected)
    first = other.train_step(step_data([batch]), step=0, learning_rate=0.0)
    assert first.loss == engine.train_step(step_data([batch]), step=0, learning_rate=0.0).loss


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_at_stage_0_the_ranks_shares_are_balanced_and_cover_everything(control: ControlPlane, world_size: int) -> None:
    _, state, initial = build(control, stage=0, precision="fp32")
    shares = [list(state.owned(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for name, weight in initial.items():
        spans = sorted(
            (f.offset, f.offset + f.tensor.numel())
            for share in shares
            for f in share
            if (f.name, f.state) == (name, MASTER)
        )
        assert [a for a, _ in spans] == [0, *[b for _, b in spans[:-1]]]
        assert spans[-1][1] == weight.numel()
    sizes = [sum(f.tensor.numel() for f in share) for share in shares]
    assert max(sizes) - min(sizes) <= 3 * len(initial)


def test_there_is_a_loss_scale_in_fp16_only(control: ControlPlane) -> None:
    _, state, _ = build(control, stage=1, precision="bf16")
    assert state.loss_scale() is None
    state.set_loss_scale(None)


def test_a_deepspeed_without_a_needed_internal_is_named(control: ControlPlane) -> None:
    engine, _, _ = build(control, stage=1, precision="fp32")
    outer = engine.engine.optimizer

    class Other:
        module, basic_optimizer = engine.engine.module, engine.engine.basic_optimizer

        class optimizer:  # noqa: N801
            param_groups = outer.param_groups

        @staticmethod
        def zero_optimization_stage() -> int:
            return 1

    with pytest.raises(MachineError, match=r"DeepSpeed .* at ZeRO stage 1 has no update_lp_params.*constraints\.txt"):
        EngineState(Other(), prefix=PARAMETER_PREFIX)
