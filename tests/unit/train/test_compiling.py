"""When blocks are compiled, and that filling a micro-batch up changes nothing that counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import IGNORED_LABEL, RunState, StepReport
from dstrain.objectives.mlm import MlmObjective
from dstrain.train.compiling import GraphWatch, choose_compiling, few_shapes, rounded_size
from dstrain.train.ds_config import EngineConfig
from tests.support.tiny_models import documents, packed, tiny_encoder, tiny_model


@pytest.mark.parametrize(
    ("config", "device", "unpadded", "enabled", "reason"),
    [
        ({}, "cuda", True, True, "every block"),
        ({}, "cpu", True, False, "on a CPU"),
        ({}, "cuda", False, False, "padded rows"),
        ({"zero_stage": 3}, "cuda", True, False, "stage 3"),
        ({"compile": "off"}, "cuda", True, False, "switched off"),
        ({"compile": "blocks"}, "cpu", True, True, "every block"),
    ],
)
def test_the_choice_and_its_reason(
    config: dict[str, object], device: str, unpadded: bool, enabled: bool, reason: str
) -> None:
    found = choose_compiling(EngineConfig(**config), device=device, unpadded=unpadded)
    assert found.enabled == enabled
    assert reason in found.reason


@pytest.mark.parametrize(("stage", "unpadded", "fix"), [(3, True, "use stage 1"), (1, False, "compile: auto")])
def test_what_cannot_be_compiled_is_refused_when_asked_for(stage: int, unpadded: bool, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        choose_compiling(EngineConfig(compile="blocks", zero_stage=stage), device="cuda", unpadded=unpadded)  # type: ignore[arg-type]


@given(st.integers(1, 10**7))
def test_sizes_are_few_and_near(number: int) -> None:
    size = rounded_size(number)
    assert size >= number
    assert size <= max(64, number * 1.125 + 1)
    assert rounded_size(size) == size


def test_there_are_eight_sizes_between_powers_of_two() -> None:
    assert len({rounded_size(n) for n in range(1025, 2049)}) == 8


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9).map(lambda x: tuple(sorted(x, reverse=True))))
def test_filled_batches_keep_what_counts(lengths: tuple[int, ...]) -> None:
    batch = packed(documents(lengths))
    filled = few_shapes(batch, usual_tokens=0)
    assert sum(filled.lengths) == len(filled.tokens) == len(filled.positions) == rounded_size(sum(lengths))
    assert filled.lengths[: len(lengths)] == lengths
    assert len(filled.targets) == len(filled.labels) == rounded_size(len(batch.targets))
    assert (filled.labels != IGNORED_LABEL).sum() == len(batch.targets)
    assert (filled.num_targets, filled.num_tokens) == (batch.num_targets, batch.num_tokens)
    assert torch.equal(filled.tokens[: len(batch.tokens)], batch.tokens)


@pytest.mark.parametrize(("length", "expected"), [(95, 100), (100, 100), (89, 96), (101, 104)])
def test_a_nearly_full_batch_becomes_a_full_one(length: int, expected: int) -> None:
    assert len(few_shapes(packed(documents((length,))), usual_tokens=100).tokens) == expected


@pytest.mark.parametrize("model", [tiny_model("bert"), tiny_model("modernbert"), tiny_encoder()])
def test_loss_and_gradients_do_not_know_of_the_filling(model: torch.nn.Module) -> None:
    batch = packed(documents((33, 20, 14)))
    results = []
    for given_ in (batch, few_shapes(batch, usual_tokens=128)):
        parts = MlmObjective().loss(model, given_)
        parts.loss_sum.backward()
        results.append((parts, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (plain, gradients), (filled, others) = results
    torch.testing.assert_close(plain.loss_sum, filled.loss_sum)
    assert plain.correct == filled.correct
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-5, msg=name)


def test_compiling_again_is_told_and_later_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    counts = iter([3, 7, 7, 7, 7, 8, 8])
    told: list[tuple[int, int]] = []
    watch = GraphWatch(lambda name, *, step, graphs: told.append((step, graphs)), count=lambda: next(counts))
    warned = []
    for step in range(1, 7):
        caplog.clear()
        watch.on_step(RunState(), report(step))
        warned.append("compiled again, 8 graphs" in caplog.text)
    assert told == [(1, 7), (5, 8)]
    assert warned == [False, False, False, False, True, False]


def report(step: int) -> StepReport:
    return StepReport(
        step=step, loss=1.0, accuracy=0.0, gradient_norm=1.0, learning_rate=0.1, applied=True, num_tokens=1, num_targets=1,
        num_rows=1, padded_tokens=1, ledger=0, epoch=0.0,
    )  # fmt: skip
