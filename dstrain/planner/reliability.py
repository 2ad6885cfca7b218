"""What saves and failures take of a run's time: interval by Young and Daly, goodput, wall time. Pure arithmetic.

The formulas are those that the run itself uses (`checkpoint.interval`); here their inputs are estimates, in a run they are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.checkpoint.interval import goodput, mean_failure_s, save_interval
from dstrain.models.anatomy import Anatomy

_SAVE_FIXED_S = 0.05
"""Of a save, besides copying: agreement and bookkeeping; order of what a save of little data takes here."""
_COPY_BYTES_S = {"gpu": 20e9, "cpu": 4e9}
"""Device to host memory: pinned PCIe Gen4/5, assumed; a CPU's own copy into prepared buffers, measured."""


@dataclass(frozen=True)
class Reliability:
    """Saves and failures of a job."""

    mean_failure_s: float
    """Between unexpected interruptions of the job."""
    checkpoint_bytes: int
    """Of one checkpoint, all ranks together: fp32 weights and both moments."""
    save_s: float
    """That a save stops training."""
    durable_s: float
    """Until a save is on disk, beside the training."""
    interval_s: float
    """Useful seconds between saves."""
    restart_s: float
    goodput: float
    """Useful share of the wall time."""


def reliability(
    anatomy: Anatomy, *, ranks: int, is_gpu: bool, device_hours_per_failure: float, restart_s: float, storage_bytes_s: float,
    longest_s: float,
) -> Reliability:  # fmt: skip
    """What saves and failures will take.

    Args:
        anatomy: the model.
        ranks: devices of the job.
        is_gpu: whether state must come from a GPU.
        device_hours_per_failure: of one device.
        restart_s: from an interruption to the next useful step, scheduler included.
        storage_bytes_s: durable writes of the whole job, bytes/s.
        longest_s: cap on the interval.
    """
    size = 12 * anatomy.parameters
    save = _SAVE_FIXED_S + size / ranks / _COPY_BYTES_S["gpu" if is_gpu else "cpu"]
    durable = size / storage_bytes_s
    mean = mean_failure_s(devices=ranks, device_hours_per_failure=device_hours_per_failure)
    interval = save_interval(save, mean_failure_s=mean, longest_s=longest_s, durable_s=durable)
    share = goodput(interval, cost_s=save, mean_failure_s=mean, restart_s=restart_s)
    return Reliability(mean, size, save, durable, interval, restart_s, share)
