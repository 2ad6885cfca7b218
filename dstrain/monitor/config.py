"""What is measured and how often it is written. Holds settings only."""

from __future__ import annotations

from pydantic import Field

from dstrain.base.config import Config


class MonitorConfig(Config):
    """How a run reports its numbers."""

    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two written points, 1 or more. Step 1 and the last step are always written. 10 keeps
    events.jsonl near 1 MB for 20 000 steps."""
    tensorboard: bool = True
    """Write TensorBoard curves to `tensorboard/` in the run folder. events.jsonl is written either way."""
    histograms_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two histograms of every weight and gradient in TensorBoard, 1 or more. None writes none:
    each time every weight and gradient is read once more, and a file grows by a few kB for each tensor."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense bf16 peak of one device, TFLOP/s. None looks the device's name up in a small table; an unknown device has
    no utilisation curve, because a guessed peak would be worse than none."""
    gpu_hour_usd: float | None = Field(default=None, gt=0)
    """Price of one device for one hour, US dollars. None writes no cost."""
