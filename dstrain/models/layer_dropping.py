"""Progressive layer dropping: later layers are left out more and more often as training goes on (arXiv 2010.13369).

Which layers a step does without is a function of seed and step, the same on every rank and for every micro-batch of the step.
Only chooses: `layer_routes` routes.
"""

from __future__ import annotations

import math

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.seeds import derive


class LayerDroppingConfig(Config):
    """How often layers are left out; without this section, never."""

    last_keep: float = Field(default=0.5, gt=0.0, le=1.0)
    """Probability with which the last layer is kept in the end; the paper's 0.5."""
    gamma: float = Field(default=0.001, gt=0.0)
    """How fast a run approaches that, in 1 / steps; the paper takes 100 / train.max_steps."""


def keep_probabilities(config: LayerDroppingConfig, *, step: int, num_layers: int) -> list[float]:
    """Of each layer at a step: 1 - i/L · (1 - θ) with θ = (1 - θ̄)·e^(-γ·step) + θ̄, all kept at step 0."""
    theta = (1.0 - config.last_keep) * math.exp(-config.gamma * step) + config.last_keep
    return [1.0 - (i + 1) / num_layers * (1.0 - theta) for i in range(num_layers)]


def kept_layers(config: LayerDroppingConfig, *, seed: int, step: int, num_layers: int) -> list[float | None]:
    """The probability with which each kept layer was kept, None for those left out."""
    chances = keep_probabilities(config, step=step, num_layers=num_layers)
    draws = [derive(seed, "layer_dropping", step, layer) / 2.0**64 for layer in range(num_layers)]
    return [chance if draw < chance else None for chance, draw in zip(chances, draws)]
