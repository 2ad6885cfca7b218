"""Settings of the loop; apart from it, so that a configuration can be read without importing the engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dstrain.base.config import Config
from dstrain.health.guards import GuardConfig


class LoopConfig(Config):
    """Batch sizes, length and rhythm of a run."""

    global_batch: int = Field(default=256, ge=1)
    """Rows (or examples) of one optimizer step, over all ranks; kept when the world size changes."""
    micro_batch: int = Field(default=32, ge=1)
    """Most rows of one forward on one rank; accumulation follows from it."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; there is one at the end in any case."""
    evaluate_rows: int | None = Field(default=1024, ge=1)
    """Held-out rows of an evaluation; None takes all."""
    resume: Literal["auto", "require", "never"] = "auto"
    """auto goes on from the newest valid checkpoint if there is one; require fails without one; never refuses to
    start in a folder that has one."""
    accept_new_data: bool = False
    """On resume, go on with data or an order that differ from the checkpoint's, as a recorded new phase
    (`--accept-new-data`); false refuses with the difference."""
    guards: GuardConfig = Field(default_factory=GuardConfig)
    """What is done about losses and gradients that are not finite or far above those before them."""
