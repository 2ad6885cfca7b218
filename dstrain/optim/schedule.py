"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config


class ScheduleConfig(Config):
    """How the learning rate moves over a run."""

    kind: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """After the warm-up: linear or cosine decay to the end; wsd (warm-up, stable, decay) holds the rate and decays over
    the last `decay_steps`; constant holds it."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear rise from 0. Default: 6 % of the run, RoBERTa's share (arXiv 1907.11692)."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Length of wsd's decay in steps. Default: 10 % of the run (arXiv 2405.18392)."""
    min_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rate at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _decay_is_for_wsd(self) -> ScheduleConfig:
        if self.decay_steps is not None and self.kind != "wsd":
            raise ValueError(f"decay_steps belongs to kind: wsd, not to kind: {self.kind}")
        return self


def learning_rate_factor(config: ScheduleConfig, *, step: int, max_steps: int) -> float:
    """Share of the peak rate at a step.

    Args:
        config: the schedule.
        step: optimizer steps done before this one, from 0.
        max_steps: length of the run.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(0.06 * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        decay = config.decay_steps if config.decay_steps is not None else max(1, round(0.1 * max_steps))
        start = max(warmup, max_steps - decay)  # a warm-up that reaches into the decay makes it shorter and steeper
        progress = (step - start) / max(1, max_steps - start)
    else:
        progress = (step - warmup) / max(1, max_steps - warmup)
    progress = min(max(progress, 0.0), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1.0 - progress
    return config.min_ratio + (1.0 - config.min_ratio) * remaining
