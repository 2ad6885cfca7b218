"""Learning-rate schedules as pure functions of recorded progress (steps, tokens, hours): nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config

_WARMUP_SHARE = 0.06
_DECAY_SHARE = 0.1


class ScheduleConfig(Config):
    """How the learning rate moves over a run."""

    kind: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant"] = "linear"
    """After the warm-up: linear or cosine decay to the end; wsd (warm-up, stable, decay) holds the rate and decays at the end;
    inverse_sqrt falls with √(warm-up / progress) (arXiv 1706.03762), which knows no end; constant holds the rate."""
    clock: Literal["steps", "tokens", "hours"] = "steps"
    """What progress is measured in: steps of train.max_steps, tokens of stop.max_tokens, or hours of
    stop.max_training_hours (arXiv 2104.07705: a budget is used up exactly, however fast the machine is)."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear rise from 0, with clock: steps. Default: 6 % of the run, RoBERTa's share (arXiv 1907.11692)."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Length of wsd's decay in steps, with clock: steps. Default: 10 % of the run (arXiv 2405.18392)."""
    warmup_share: float | None = Field(default=None, ge=0.0, lt=1.0)
    """The rise as a share of the budget, with clock: tokens or hours. Default: 0.06."""
    decay_share: float | None = Field(default=None, gt=0.0, le=1.0)
    """wsd's decay as a share of the budget, with clock: tokens or hours. Default: 0.1."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    """wsd's decay: a straight line, or 1 - √progress, which ends lower (arXiv 2405.18392)."""
    min_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rate at the end (inverse_sqrt: at least), as a share of the peak."""

    @model_validator(mode="after")
    def _pairs(self) -> ScheduleConfig:
        for name in ("decay_steps", "decay_share"):
            if getattr(self, name) is not None and self.kind != "wsd":
                raise ValueError(f"{name} belongs to kind: wsd, not to kind: {self.kind}")
        if self.decay_shape != "linear" and self.kind != "wsd":
            raise ValueError(f"decay_shape belongs to kind: wsd, not to kind: {self.kind}")
        in_steps = self.clock == "steps"
        for steps, share in (("warmup_steps", "warmup_share"), ("decay_steps", "decay_share")):
            wrong, right = (share, steps) if in_steps else (steps, share)
            if getattr(self, wrong) is not None:
                raise ValueError(f"{wrong} does not go with clock: {self.clock}; give {right} instead")
        return self


def learning_rate_factor(config: ScheduleConfig, *, step: int, max_steps: int) -> float:
    """Share of the peak rate at a step, with clock: steps.

    Args:
        config: the schedule.
        step: optimizer steps done before this one, from 0.
        max_steps: length of the run.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(_WARMUP_SHARE * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    decay = config.decay_steps if config.decay_steps is not None else max(1, round(_DECAY_SHARE * max_steps))
    if config.kind == "inverse_sqrt":
        return _inverse_sqrt(config, max(warmup, 1), step)
    return _falling(config, step, warmup=warmup, decay=decay, end=max_steps, least=1)


def budget_factor(config: ScheduleConfig, *, share: float) -> float:
    """Share of the peak rate when a share of the budget is used up, with clock: tokens or hours.

    Args:
        config: the schedule.
        share: from 0; above 1 counts as 1.
    """
    share = min(max(share, 0.0), 1.0)
    warmup = config.warmup_share if config.warmup_share is not None else _WARMUP_SHARE
    if share < warmup:
        return share / warmup
    if config.kind == "inverse_sqrt":
        return _inverse_sqrt(config, warmup or _WARMUP_SHARE, share)
    decay = config.decay_share if config.decay_share is not None else _DECAY_SHARE
    return _falling(config, share, warmup=warmup, decay=decay, end=1.0, least=1e-9)


def _inverse_sqrt(config: ScheduleConfig, warmup: float, now: float) -> float:
    return max(config.min_ratio, min(1.0, math.sqrt(warmup / max(now, warmup))))


def _falling(config: ScheduleConfig, now: float, *, warmup: float, decay: float, end: float, least: float) -> float:
    """After the warm-up, in any unit; `least` keeps a decay of no length from dividing by 0."""
    if config.kind == "constant":
        return 1.0
    # A warm-up that reaches into wsd's decay makes it shorter and steeper.
    start = max(warmup, end - decay) if config.kind == "wsd" else warmup
    progress = min(max((now - start) / max(least, end - start), 0.0), 1.0)
    if config.kind == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay_shape == "one_minus_sqrt":
        remaining = 1.0 - math.sqrt(progress)
    else:
        remaining = 1.0 - progress
    return config.min_ratio + (1.0 - config.min_ratio) * remaining
