"""The settings that people vary and compare runs by, out of a run's whole configuration. Chooses; measures nothing."""

from __future__ import annotations

from typing import Any

from dstrain.monitor.hparams import Setting
from dstrain.stages.assembly import AnyConfig, Assembly, Site

NUMBERS = (
    "seed",
    "train.global_batch",
    "train.micro_batch",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "schedule.warmup_steps",
    "objective.mask_rate",
    "data.sequence_length",
    "task.max_length",
    "engine.zero_stage",
)
TEXTS = ("optimizer.kind", "optimizer.betas", "schedule.kind", "model.init_from", "run_folder")
"""Paths of both stages; a test holds every one to the configuration of at least one of them."""
FIRST = ("stage", "model", "steps", "train.global_batch", "optimizer.learning_rate")
"""Columns that are looked at first."""


def hyperparameters(config: AnyConfig, site: Site, parts: Assembly, *, num_parameters: int) -> list[Setting]:
    """Every column of TensorBoard's table, in order, whatever the stage; empty where a stage has no such setting.

    Args:
        config: of the run.
        site: where it runs.
        parts: of its stage.
        num_parameters: of the model.
    """
    model_type = config.model.config.get("model_type")
    texts = {
        "stage": parts.stage, "model": _text(model_type), "precision": site.precision,
        **{path: _text(_value(config, path)) for path in TEXTS},
    }  # fmt: skip
    numbers = {
        "parameters, M": num_parameters / 1e6, "steps": parts.max_steps, "ranks": site.world.size,
        **{path: _value(config, path) for path in NUMBERS},
    }  # fmt: skip
    return [
        *(Setting(name, value, is_number=False, comes_first=name in FIRST) for name, value in texts.items()),
        *(Setting(name, value, is_number=True, comes_first=name in FIRST) for name, value in numbers.items()),
    ]


def _value(config: Any, path: str) -> Any:
    """What stands at a path, or None where a part of it is missing."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _text(value: Any) -> str | None:
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return None if value is None else str(value)
