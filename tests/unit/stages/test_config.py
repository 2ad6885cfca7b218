"""The pairs that only the whole configuration can judge."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.base.config import Config, merge, to_plain, validate
from dstrain.base.errors import ConfigError
from dstrain.stages.config import FinetuneConfig, PretrainConfig

PRETRAIN: dict[str, Any] = {
    "run_folder": "run", "data": {"path": "shards"}, "model": {"config": {"model_type": "bert"}},
    "train": {"max_steps": 100, "global_batch": 12},
}  # fmt: skip
FINETUNE: dict[str, Any] = {
    "run_folder": "run", "model": {"init_from": "pretrained"}, "task": {"kind": "classification", "train": "train.tsv"},
}  # fmt: skip


def read(model: type[Config], base: dict[str, Any], **sections: Any) -> Any:
    return validate(model, merge(base, sections), source="run.yaml")


def test_a_minimal_run_of_each_stage_is_valid() -> None:
    assert read(PretrainConfig, PRETRAIN).train.max_steps == 100
    assert read(FinetuneConfig, FINETUNE).train.epochs == 3.0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"warmup_steps": 101}, r"schedule\.warmup_steps=101 are longer than train\.max_steps=100"),
        ({"kind": "wsd", "warmup_steps": 60, "decay_steps": 41}, r"warmup_steps=60 and schedule\.decay_steps=41 are longer"),
    ],
)  # fmt: skip
def test_a_schedule_longer_than_the_run_is_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(PretrainConfig, PRETRAIN, schedule=schedule)
    with pytest.raises(ConfigError, match=message):
        read(FinetuneConfig, FINETUNE, schedule=schedule, train={"max_steps": 100})


def test_a_schedule_that_just_fits_is_taken() -> None:
    read(PretrainConfig, PRETRAIN, schedule={"kind": "wsd", "warmup_steps": 60, "decay_steps": 40})
    read(FinetuneConfig, FINETUNE, schedule={"warmup_steps": 5000})  # its length is known only with the task's file


def test_lanes_must_divide_the_global_batch() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=5 does not divide train\.global_batch=12"):
        read(PretrainConfig, PRETRAIN, data={"lanes": 5})
    assert read(PretrainConfig, PRETRAIN, data={"lanes": 4}).data.lanes == 4


def test_fine_tuning_needs_a_tokenizer_from_somewhere() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: give a tokenizer folder, or model\.init_from"):
        validate(FinetuneConfig, {**FINETUNE, "model": {"config": {"model_type": "bert"}}}, source="run.yaml")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"max_steps": 0}}, "train.max_steps"),
        ({"train": {"resume": "maybe"}}, "train.resume"),
        ({"engine": {"zero_stage": 4}}, "engine.zero_stage"),
        ({"engine": {"precision": "fp8"}}, "engine.precision"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last"),
        ({"seed": -1}, "seed"),
        ({"task": {"kind": "classification"}}, "task"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "deepspeed"),
    ],
)  # fmt: skip
def test_an_impossible_value_names_its_key(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml: {key}"):
        read(PretrainConfig, PRETRAIN, **sections)


@pytest.mark.parametrize(("model", "base"), [(PretrainConfig, PRETRAIN), (FinetuneConfig, FINETUNE)])
def test_the_resolved_configuration_reads_back_as_itself(model: type[Config], base: dict[str, Any]) -> None:
    config = read(model, base)
    assert validate(model, to_plain(config), source="resolved") == config


def test_stages_default_to_their_own_habits() -> None:
    assert read(PretrainConfig, PRETRAIN).optimizer.betas == (0.9, 0.98)
    tuned = read(FinetuneConfig, FINETUNE)
    assert (tuned.optimizer.learning_rate, tuned.optimizer.betas) == (5e-5, (0.9, 0.999))
    assert (tuned.train.global_batch, tuned.train.micro_batch) == (32, 32)


@pytest.mark.parametrize(
    ("clock", "budget"), [("tokens", {"max_tokens": 1000}), ("hours", {"max_training_hours": 1.0})]
)
def test_a_schedule_by_tokens_or_hours_needs_the_budget_that_ends_the_run(clock: str, budget: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"schedule.clock: {clock} runs against stop.{next(iter(budget))}"):
        read(PretrainConfig, PRETRAIN, schedule={"clock": clock})
    assert read(PretrainConfig, PRETRAIN, schedule={"clock": clock}, stop=budget).schedule.clock == clock
