"""The columns of the hyper-parameter page: the same for both stages, and each of them somewhere in the configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dstrain.base.world import World
from dstrain.cli.training import load_stage_config
from dstrain.stages.config import FinetuneConfig, PretrainConfig
from dstrain.stages.hyperparameters import FIRST, NUMBERS, TEXTS, hyperparameters
from tests.support.runs import ROOT


def columns(stage: str) -> dict[str, Any]:
    config = load_stage_config(stage, ROOT / f"configs/demo/{stage}.yaml", [])
    site = SimpleNamespace(world=World(rank=0, size=2), precision="fp32")
    parts = SimpleNamespace(stage=stage, max_steps=800)
    return {s.name: s for s in hyperparameters(config, site, parts, num_parameters=1_500_000)}  # type: ignore[arg-type]


def test_both_stages_have_the_same_columns_of_the_same_kind() -> None:
    pretrain, finetune = (
        [(s.name, s.is_number) for s in columns(stage).values()] for stage in ("pretrain", "finetune")
    )
    assert pretrain == finetune


def test_values_are_those_of_the_run() -> None:
    found = {name: setting.value for name, setting in columns("pretrain").items()}
    assert found["optimizer.learning_rate"] == 2e-3
    assert (found["objective.mask_rate"], found["data.sequence_length"], found["task.max_length"]) == (0.15, 128, None)
    assert (found["stage"], found["model"], found["parameters, M"], found["ranks"]) == (
        "pretrain",
        "modernbert",
        1.5,
        2,
    )
    assert found["optimizer.betas"] == "0.9, 0.98"
    assert columns("finetune")["model.init_from"].value == "runs/demo/pretrain"


def test_what_people_look_at_first_comes_first() -> None:
    assert {name for name, setting in columns("pretrain").items() if setting.comes_first} == set(FIRST)


@pytest.mark.parametrize("path", [*NUMBERS, *TEXTS])
def test_every_path_is_a_field_of_the_configuration(path: str) -> None:
    assert any(_has(model, path.split(".")) for model in (PretrainConfig, FinetuneConfig)), path


def _has(model: Any, names: list[str]) -> bool:
    fields = getattr(model, "model_fields", {})
    if names[0] not in fields:
        return False
    return len(names) == 1 or _has(fields[names[0]].annotation, names[1:])
