"""Histograms of real updates, at every ZeRO stage and in half precision, against the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import RunState, StepReport
from dstrain.checkpoint.fragments import EngineState
from dstrain.monitor.histogram import Histogram, histogram_of
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import PARAMETER_PREFIX, Engine
from dstrain.train.histograms import Histograms
from tests.support.tiny_models import documents, packed, step_data, tiny_model

BATCH_LENGTHS = (9, 5, 3)
SETTINGS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]


def build(control: ControlPlane, *, stage: int, precision: str, clip_norm: float = 0.0) -> tuple[Engine, EngineState]:
    model = tiny_model("bert")
    initial = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    engine = Engine(
        model, MlmObjective(), config=EngineConfig(zero_stage=stage, bucket_elements=10_000),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(clip_norm=clip_norm), control=control, device="cpu", precision=precision, micro_batch=3,  # type: ignore[arg-type]
        accumulation=1, seed=0,
    )  # fmt: skip
    state = EngineState(engine.engine, prefix=PARAMETER_PREFIX)
    state.fill_masters(initial)
    return engine, state


def run(
    engine: Engine,
    state: EngineState,
    steps: int,
    *,
    every: int,
    start_step: int = 0,
    learning_rate: float = 0.0,
    **changes: Any,
) -> dict[int, dict[str, Histogram]]:
    """What is written over some steps."""
    written: dict[int, dict[str, Histogram]] = {}
    found = Histograms(
        every, names=state.shapes, owned=lambda: state.owned(rank=0, world_size=1), control=engine.control,
        write=lambda step, histograms: written.update({step: dict(histograms)}), start_step=start_step,
    )  # fmt: skip
    engine.show_updates(found.look)
    for step in range(start_step, start_step + steps):
        data = step_data([packed(documents(BATCH_LENGTHS))])
        totals = engine.train_step(data, step=step, learning_rate=learning_rate, **changes)
        found.on_step(RunState(step=step + 1), _report(step + 1, applied=totals.applied))
    return written


def _report(step: int, *, applied: bool) -> StepReport:
    return StepReport(
        step=step, loss=1.0, accuracy=0.0, gradient_norm=1.0, learning_rate=0.0, applied=applied, num_tokens=1, num_targets=1,
        num_rows=1, padded_tokens=1, ledger=1, epoch=0.0,
    )  # fmt: skip


def _true_gradients() -> dict[str, torch.Tensor]:
    model, batch = tiny_model("bert"), packed(documents(BATCH_LENGTHS))
    nn.functional.cross_entropy(model(batch), batch.labels).backward()
    return {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_weights_and_gradients_are_those_of_the_model(control: ControlPlane, stage: int, precision: str) -> None:
    engine, state = build(control, stage=stage, precision=precision)
    weights = {name: p.detach().clone() for name, p in tiny_model("bert").model.named_parameters()}
    (written,) = run(engine, state, 1, every=1).values()
    assert set(written) == {f"{kind}/{name}" for kind in ("weights", "gradients") for name in weights}
    gradients = _true_gradients()
    for name, weight in weights.items():
        assert written[f"weights/{name}"].counts == histogram_of(weight).counts, name
        found, true = written[f"gradients/{name}"], histogram_of(gradients[name])
        assert found.size == true.size, name
        close = 1e-3 if precision == "fp32" else 0.1
        assert found.squares == pytest.approx(true.squares, rel=close, abs=1e-8 if precision == "fp32" else 1e-6), name


def test_gradients_are_taken_after_clipping(control: ControlPlane) -> None:
    for stage in (0, 1, 3):
        engine, state = build(control, stage=stage, precision="fp32", clip_norm=0.01)
        (written,) = run(engine, state, 1, every=1).values()
        squares = sum(found.squares for name, found in written.items() if name.startswith("gradients/"))
        assert squares**0.5 == pytest.approx(0.01, rel=1e-3), stage


def test_only_every_nth_step_is_counted_whatever_step_a_process_begins_at(control: ControlPlane) -> None:
    engine, state = build(control, stage=1, precision="fp32")
    assert list(run(engine, state, 7, every=3)) == [3, 6]
    assert list(run(engine, state, 4, every=3, start_step=5)) == [6, 9]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_is_left_out_has_no_histogram_and_the_next_one_its_own(control: ControlPlane, stage: int) -> None:
    engine, state = build(control, stage=stage, precision="fp32")
    assert run(engine, state, 1, every=1, judge=lambda **_: False) == {}
    (written,) = run(engine, state, 1, every=1, start_step=1).values()
    assert {name.removeprefix("weights/"): found.size for name, found in written.items() if "weights/" in name} == {
        name: int(torch.tensor(shape).prod()) for name, shape in state.shapes.items()
    }


def test_at_stage_0_two_ranks_count_what_both_hold_only_once(control: ControlPlane) -> None:
    engine, state = build(control, stage=0, precision="fp32")
    (whole,) = run(engine, state, 1, every=1).values()
    shares = []
    for rank in (0, 1):
        found = Histograms(
            1, names=state.shapes, owned=lambda rank=rank: state.owned(rank=rank, world_size=2), control=control,  # type: ignore[misc]
            write=lambda _, histograms: shares.append(histograms), start_step=0,
        )  # fmt: skip
        engine.show_updates(found.look)
        engine.train_step(step_data([packed(documents(BATCH_LENGTHS))]), step=0, learning_rate=0.0)
        found.on_step(RunState(step=1), _report(1, applied=True))
    for name, found in whole.items():
        assert (shares[0][name] + shares[1][name]).size == found.size, name
        assert 0 < shares[0][name].size < found.size or found.size < 2, name


@pytest.mark.parametrize("stage", [0, 1])
def test_looking_changes_no_bit(control: ControlPlane, stage: int) -> None:
    (plain, plain_state), (looked, looked_state) = (build(control, stage=stage, precision="fp32") for _ in range(2))
    assert len(run(looked, looked_state, 3, every=1, learning_rate=1e-2)) == 3
    for step in range(3):
        plain.train_step(step_data([packed(documents(BATCH_LENGTHS))]), step=step, learning_rate=1e-2)
    pairs = list(zip(plain_state.held(), looked_state.held()))
    assert [one.name for one, other in pairs if not torch.equal(one.tensor, other.tensor)] == []
