"""One optimizer step in this process: the mean over the right targets, skips that change nothing, dropout by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ConfigError, DataError
from dstrain.base.protocols import IGNORED_LABEL, Interrupted, LossParts, MicroBatch, StepFlags
from dstrain.checkpoint.fragments import EngineState
from dstrain.health.guards import GuardConfig, Guards
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import PARAMETER_PREFIX, Engine, TrainedModule
from tests.support.tiny_models import documents, packed, step_data, tiny_model

LENGTHS = (12, 11, 9, 9, 7, 6, 4, 3)
PRECISIONS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]


def build(
    control: ControlPlane, *, stage: int = 1, precision: str = "fp32", accumulation: int = 1, model: nn.Module | None = None,
    clip_norm: float = 1.0, **fields: Any,
) -> Watched:  # fmt: skip
    return Watched(
        model or tiny_model("bert", **fields), MlmObjective(), config=EngineConfig(zero_stage=stage, bucket_elements=10_000),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(clip_norm=clip_norm), control=control, device="cpu", precision=precision, micro_batch=8,  # type: ignore[arg-type]
        accumulation=accumulation, seed=5,
    )  # fmt: skip


class Watched(Engine):
    """An engine whose fp32 state is looked at, from the start as in a run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state = EngineState(self.engine, prefix=PARAMETER_PREFIX)


def rows() -> list[tuple[Tensor, list[int]]]:
    """Documents and their targets: very different numbers of them, so that a mean of means shows."""
    return [(text, list(range(0, len(text), 1 + i % 4))) for i, text in enumerate(documents(LENGTHS))]


def batch_of(part: list[tuple[Tensor, list[int]]]) -> MicroBatch:
    starts = [sum(len(t) for t, _ in part[:i]) for i in range(len(part))]
    targets = torch.tensor([start + at for start, (_, chosen) in zip(starts, part) for at in chosen])
    return packed([text for text, _ in part], targets=targets)


def weights(engine: Watched) -> dict[tuple[str, str], Tensor]:
    return {(f.name, f.state): f.tensor.clone() for f in engine.state.held()}


def step(engine: Engine, batches: list[MicroBatch], *, number: int = 0, rate: float = 1e-2, **options: Any) -> Any:
    return engine.train_step(step_data(batches, **options), step=number, learning_rate=rate)


def test_the_loss_is_the_mean_over_all_targets_however_the_rows_are_cut(control: ControlPlane) -> None:
    reference = build(control)
    whole = step(reference, [batch_of(rows())])
    after = weights(reference)
    for cuts in ([0, 2, 4, 6, 8], [0, 1, 2, 3, 8]):
        engine = build(control, accumulation=4)
        parts = [batch_of(rows()[a:b]) for a, b in zip(cuts, cuts[1:])]  # noqa: RUF007
        found = step(engine, parts)
        assert found.loss == pytest.approx(whole.loss, abs=1e-6)
        assert found.accuracy == whole.accuracy
        assert found.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
        for key, tensor in weights(engine).items():
            # Adam's first step is rate · sign(gradient) where gradients are large; moments are the sharper comparison.
            torch.testing.assert_close(tensor, after[key], rtol=1e-3, atol=2e-6 if key[1] != "fp32" else 2e-3)


def test_the_loss_is_cross_entropy_over_the_number_of_targets(control: ControlPlane) -> None:
    batch, model = batch_of(rows()), tiny_model("bert")
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(batch), batch.labels)
    found = step(build(control, model=model), [batch])
    assert found.loss == pytest.approx(float(expected), abs=1e-6)
    assert found.num_targets == len(batch.targets)


def test_gradients_are_those_of_the_mean_loss_before_clipping(control: ControlPlane) -> None:
    batch, model = batch_of(rows()), tiny_model("bert")
    nn.functional.cross_entropy(model(batch), batch.labels).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    for stage in (0, 1, 2, 3):
        assert step(build(control, stage=stage), [batch]).gradient_norm == pytest.approx(norm, rel=1e-4), stage


def test_filler_counts_for_nothing(control: ControlPlane) -> None:
    """A rank short of rows gets a micro-batch whose only target is ignored."""
    filler = packed(documents((3,)), targets=torch.tensor([0]), labels=torch.tensor([IGNORED_LABEL]))
    filler = MicroBatch(**{**vars(filler), "num_targets": 0, "num_tokens": 0})
    alone, with_filler = build(control), build(control, accumulation=2)
    one, two = step(alone, [batch_of(rows())]), step(with_filler, [batch_of(rows()), filler])
    assert two.loss == pytest.approx(one.loss, abs=1e-6)
    assert two.num_tokens == one.num_tokens == sum(LENGTHS)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_clipping_bounds_the_gradient_that_enters_the_moments(control: ControlPlane, stage: int) -> None:
    free, clipped = build(control, stage=stage, clip_norm=0.0), build(control, stage=stage, clip_norm=0.01)
    norm = step(free, [batch_of(rows())]).gradient_norm
    step(clipped, [batch_of(rows())])
    assert norm > 0.1
    ratio = 0.01 / norm
    before, after = weights(free), weights(clipped)
    name = ("bert.encoder.layer.0.output.dense.weight", "exp_avg")
    torch.testing.assert_close(after[name], before[name] * ratio, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("stage", "precision"), PRECISIONS)
def test_a_gradient_that_is_not_finite_skips_the_step_and_changes_nothing(
    control: ControlPlane, stage: int, precision: str
) -> None:
    engine, good = build(control, stage=stage, precision=precision, accumulation=2), batch_of(rows())
    step(engine, [good, good])
    before, steps_done = weights(engine), engine.state.optimizer_step()

    spoilt = Spoiler(engine)
    with spoilt:
        found = step(engine, [good, good], number=1)
    assert spoilt.times > 0
    assert not found.applied
    after = weights(engine)
    different = [key for key in before if not torch.equal(before[key], after[key])]
    assert different == []
    assert engine.state.optimizer_step() == steps_done

    again = step(engine, [good, good], number=2)
    assert again.applied, "the next good step is taken: nothing of the bad one is left in the gradients"
    assert not torch.equal(weights(engine)["bert.embeddings.word_embeddings.weight", "fp32"],
                           before["bert.embeddings.word_embeddings.weight", "fp32"])  # fmt: skip


class Spoiler:
    """Makes one gradient NaN in the second micro-batch, as an overflow in backward would."""

    def __init__(self, engine: Engine) -> None:
        self._module, self.times = engine.engine.module.model.model.get_input_embeddings(), 0

    def _forward(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.times += 1
        if self.times == 2:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    def __enter__(self) -> None:
        self._handle = self._module.register_forward_hook(self._forward)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def dropping(control: ControlPlane) -> Watched:
    return build(control, accumulation=2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)


def test_dropout_is_a_function_of_seed_step_rank_and_micro_batch(control: ControlPlane) -> None:
    batches = [batch_of(rows()), batch_of(rows())]
    losses = []
    for disturbance in (0, 1):
        torch.manual_seed(disturbance)
        torch.rand(disturbance * 1000)
        losses.append([step(dropping(control), batches, number=n).loss for n in (0, 0, 1)])
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[0][1]
    assert abs(losses[0][0] - losses[0][2]) > 1e-4, "another step drops other activations"


def test_the_micro_batches_of_a_step_drop_differently(control: ControlPlane) -> None:
    seen: list[Tensor] = []
    engine = dropping(control)
    dropout = engine.engine.module.model.model.bert.embeddings.dropout
    dropout.register_forward_hook(lambda module, args, output: seen.append(output.detach() == 0))
    step(engine, [batch_of(rows()), batch_of(rows())])
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_evaluation_and_prediction_drop_nothing_and_leave_training_on(control: ControlPlane) -> None:
    engine, batch = dropping(control), batch_of(rows())
    loss, accuracy, targets = engine.evaluate([batch])
    assert engine.evaluate([batch]) == (loss, accuracy, targets)
    logits = engine.predict([batch])[0]
    assert float(nn.functional.cross_entropy(logits, batch.labels)) == pytest.approx(loss, abs=1e-6)
    assert float((logits.argmax(-1) == batch.labels).float().mean()) == pytest.approx(accuracy)
    assert targets == len(batch.targets)
    assert engine.engine.module.training


def test_evaluation_weighs_batches_by_their_targets(control: ControlPlane) -> None:
    engine = build(control)
    parts = [batch_of(rows()[:1]), batch_of(rows()[1:])]
    assert engine.evaluate(parts)[0] == pytest.approx(engine.evaluate([batch_of(rows())])[0], abs=1e-6)


def test_counters_the_ledger_and_a_stop_request_come_back(control: ControlPlane) -> None:
    engine = build(control)
    data = step_data([batch_of(rows())], ledger=(1 << 62) + 12345)
    totals = engine.train_step(data, step=0, learning_rate=0.0, flags=StepFlags(stop=True))
    assert totals.ledger == (1 << 62) + 12345
    assert totals.flags == StepFlags(stop=True)
    assert (totals.num_rows, totals.num_tokens) == (8, sum(LENGTHS))
    assert not engine.train_step(data, step=1, learning_rate=0.0).flags.stop


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_learning_rate_is_the_steps_own(control: ControlPlane, stage: int) -> None:
    engine = build(control, stage=stage)
    before = weights(engine)
    step(engine, [batch_of(rows())], rate=0.0)
    assert all(torch.equal(before[key], t) for key, t in weights(engine).items() if key[1] == "fp32")
    step(engine, [batch_of(rows())], rate=1e-3)
    assert not all(torch.equal(before[key], t) for key, t in weights(engine).items() if key[1] == "fp32")


def test_a_raw_key_that_deepspeed_refuses_is_a_users_fault(control: ControlPlane) -> None:
    with pytest.raises(ConfigError, match=r"(?s)deepspeed: refused by DeepSpeed .*offload_optimizer\.device"):
        Engine(
            tiny_model("bert"), MlmObjective(), config=EngineConfig(), optimizer=OptimizerConfig(), control=control,
            device="cpu", precision="fp32", micro_batch=1, accumulation=1, seed=0,
            raw={"zero_optimization": {"offload_optimizer": {"device": "moon"}}},
        )  # fmt: skip


def test_names_inside_the_engine_start_with_the_prefix_that_is_dropped() -> None:
    module = TrainedModule(tiny_model("bert"), MlmObjective())
    assert all(name.startswith(PARAMETER_PREFIX) for name, _ in module.named_parameters())


def test_a_fault_of_the_data_is_raised_by_the_step_and_leaves_the_weights_alone(control: ControlPlane) -> None:
    engine = build(control)
    before = weights(engine)
    with pytest.raises(DataError, match="damaged"):
        engine.train_step(DataError("a damaged shard"), step=0, learning_rate=0.1)
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(engine).items())
    assert step(engine, [batch_of(rows())]).applied


def test_each_flag_comes_back_as_itself(control: ControlPlane) -> None:
    engine, data = build(control), step_data([batch_of(rows())])
    for name in vars(StepFlags()):
        asked = StepFlags(**{name: True})
        assert engine.train_step(data, step=0, learning_rate=0.0, flags=asked).flags == asked


def test_an_evaluation_is_left_when_asked_to_and_training_goes_on(control: ControlPlane) -> None:
    engine, batch = build(control), batch_of(rows())
    polls = iter([False, False, True])
    for look in (engine.evaluate, engine.predict):
        with pytest.raises(Interrupted):
            look([batch] * 40, should_leave=lambda: next(polls, True))
        assert engine.engine.module.training
    assert engine.evaluate([batch], should_leave=lambda: False) == engine.evaluate([batch])


def test_a_rank_without_data_leaves_without_a_step(control: ControlPlane) -> None:
    engine = build(control)
    before = weights(engine)
    with pytest.raises(Interrupted):
        engine.train_step(Interrupted(), step=0, learning_rate=0.1)
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(engine).items())


class Refuses:
    """A judge that leaves out what it is told to, and remembers what it was asked."""

    def __init__(self, *, refuse: bool) -> None:
        self.refuse, self.asked = refuse, []

    def __call__(self, *, loss: float, gradient_norm: float, overflowed: bool) -> bool:
        self.asked.append((loss, gradient_norm, overflowed))
        return not self.refuse


def every_byte(engine: Watched) -> dict[str, bytes]:
    """Masters, moments, low-precision parameters and Adam's counters."""
    held = {f"{f.name}|{f.state}": f.tensor.contiguous().view(torch.uint8) for f in engine.state.held()}
    module = {
        f"{name}|module": getattr(p, "ds_tensor", p).detach().contiguous().view(-1).view(torch.uint8)
        for name, p in engine.engine.module.named_parameters()
    }
    steps = {
        f"step {i}": state["step"].reshape(1).view(torch.uint8)
        for i, state in enumerate(engine.engine.basic_optimizer.state.values())
        if "step" in state
    }
    return {key: tensor.cpu().numpy().tobytes() for key, tensor in {**held, **module, **steps}.items()}


ALL = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize(("stage", "precision"), ALL)
def test_an_update_that_is_left_out_changes_no_byte_and_leaves_no_gradient_behind(
    control: ControlPlane, stage: int, precision: str, first: bool
) -> None:
    engine, good = build(control, stage=stage, precision=precision, accumulation=2), batch_of(rows())
    if not first:
        step(engine, [good, good])
    before = every_byte(engine)
    judge = Refuses(refuse=True)
    data = step_data([good, good])
    left_out = engine.train_step(data, step=1, learning_rate=1e-2, judge=judge)
    assert [key for key, value in every_byte(engine).items() if value != before[key]] == []
    assert not left_out.applied
    assert left_out.gradient_norm > 0
    assert judge.asked == [(left_out.loss, pytest.approx(left_out.gradient_norm), False)], (
        "asked once, with global numbers"
    )

    taken = engine.train_step(data, step=1, learning_rate=1e-2, judge=Refuses(refuse=False))
    assert taken.applied
    assert (taken.loss, taken.gradient_norm) == (left_out.loss, left_out.gradient_norm), "nothing was accumulated twice"
    reference = build(control, stage=stage, precision=precision, accumulation=2)
    if not first:
        step(reference, [good, good])
    reference.train_step(data, step=1, learning_rate=1e-2)
    assert every_byte(engine) == every_byte(reference)


@pytest.mark.parametrize(("stage", "precision"), ALL)
def test_an_injected_nan_changes_no_byte_and_the_judge_hears_of_it_once(
    control: ControlPlane, stage: int, precision: str
) -> None:
    engine, good = build(control, stage=stage, precision=precision, accumulation=2), batch_of(rows())
    step(engine, [good, good])
    before = every_byte(engine)
    judge = Refuses(refuse=False)
    with Spoiler(engine):
        found = engine.train_step(step_data([good, good]), step=1, learning_rate=1e-2, judge=judge)
    assert [key for key, value in every_byte(engine).items() if value != before[key]] == []
    assert not found.applied
    [(loss, norm, overflowed)] = judge.asked
    assert (overflowed, loss) == (True, found.loss)
    assert not math.isfinite(norm)


@pytest.mark.parametrize(("stage", "precision"), ALL)
def test_a_loss_that_is_not_finite_in_one_micro_batch_is_left_out_by_the_guards(
    control: ControlPlane, stage: int, precision: str
) -> None:
    """Also where the gradients would be finite: the loss alone says so."""
    engine, good = build(control, stage=stage, precision=precision, accumulation=2), batch_of(rows())
    step(engine, [good, good])
    before = every_byte(engine)
    guards, objective = Guards(GuardConfig()), engine.engine.module._objective
    original, times = objective.loss, iter(range(100))

    def spoilt(model: nn.Module, batch: MicroBatch) -> LossParts:
        parts = original(model, batch)
        return LossParts(parts.loss_sum + (float("inf") if next(times) == 1 else 0.0), parts.correct)

    objective.loss = spoilt
    judge = lambda **numbers: guards.judge(1, **numbers).action == "go_on"  # noqa: E731
    found = engine.train_step(step_data([good, good]), step=1, learning_rate=1e-2, judge=judge)
    assert (found.loss, found.applied) == (float("inf"), False)
    assert math.isfinite(found.gradient_norm)
    assert [fault.kind for fault in guards.verdict.faults] == ["non_finite_loss"]
    assert [key for key, value in every_byte(engine).items() if value != before[key]] == []


def test_out_of_memory_names_the_setting_to_lower(control: ControlPlane) -> None:
    engine = build(control)

    def full(model: nn.Module, batch: MicroBatch) -> LossParts:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine.engine.module._objective.loss = full
    with pytest.raises(ConfigError, match=r"step 4 does not fit .*train\.micro_batch \(now 8"):
        step(engine, [batch_of(rows())], number=3)


def test_a_judge_is_not_asked_while_deepspeed_builds_its_optimizer(control: ControlPlane) -> None:
    engine = build(control, stage=0, precision="bf16")
    judge = Refuses(refuse=True)
    engine.train_step(step_data([batch_of(rows())]), step=0, learning_rate=0.1, judge=judge)
    assert len(judge.asked) == 1
    assert step(engine, [batch_of(rows())]).applied, "without a judge nothing is left out"


@pytest.mark.slow  # inductor compiles for a minute
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_take_the_same_steps(control: ControlPlane, stage: int) -> None:
    batches = [packed(documents(lengths)) for lengths in ((20, 20, 9), (40, 11), (49, 1))]
    losses = []
    for choice in ("off", "blocks"):
        engine = Engine(
            tiny_model("bert"), MlmObjective(compiled=choice == "blocks"), config=EngineConfig(zero_stage=stage, compile=choice),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(), control=control, device="cpu", precision="fp32", micro_batch=1, accumulation=1,
            seed=0, row_length=52,
        )  # fmt: skip
        assert engine.compiling.enabled == (choice == "blocks")
        losses.append(
            [engine.train_step(step_data([b]), step=n, learning_rate=1e-2).loss for n, b in enumerate(batches)]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
