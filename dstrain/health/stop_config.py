"""What may end a run besides its length: settings of the time limit, the grace, and budgets in hours, dollars and tokens.

Turns budgets into limits in time; measures nothing by itself.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.health.stop_deadline import Limit


class StopConfig(Config):
    """When a run saves and leaves before its last step, and how much time it then has."""

    slurm_end: bool = True
    """Ask SLURM for the end of the job and save before it; nothing happens outside of a SLURM job."""
    ask_every_s: float = Field(default=120.0, ge=1.0)
    """Seconds between two questions to the SLURM controller; limits can be changed while a job runs."""
    margin_s: float = Field(default=60.0, ge=0.0)
    """Seconds kept free before the end of the SLURM job, besides one step and one save: SLURM itself counts in minutes."""
    grace_s: float | None = Field(default=None, ge=0.0)
    """Seconds from SIGTERM to SIGKILL where the job runs (SLURM's KillWait or GraceTime, 30 under torchrun). A save that
    would take longer is not begun. Default: unknown, so a save is always tried."""
    max_hours: float | None = Field(default=None, gt=0.0)
    """Longest wall time of one job, in hours; then it saves and may be started again."""
    max_device_hours: float | None = Field(default=None, gt=0.0)
    """Device-hours of the whole run, over all its restarts, start-up and idle time included; then it ends for good."""
    max_usd: float | None = Field(default=None, gt=0.0)
    """The same in dollars; needs usd_per_device_hour."""
    usd_per_device_hour: float | None = Field(default=None, gt=0.0)
    """Price of one device (GPU, or CPU process) for one hour, in dollars."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the whole run; then it saves and ends for good, wherever in the schedule it is."""
    max_training_hours: float | None = Field(default=None, gt=0.0)
    """Hours in steps of the whole run, over all its restarts, without start-up, saves and idle time; then it saves and ends
    for good."""
    look_every_s: float = Field(default=5.0, gt=0.0)
    """Seconds between two looks for the files `stop` and `save` in the run folder."""

    @model_validator(mode="after")
    def _pairs(self) -> StopConfig:
        if self.max_usd is not None and self.usd_per_device_hour is None:
            raise ValueError("max_usd needs usd_per_device_hour: the price of one device for one hour")
        return self


def budget_limits(
    config: StopConfig, *, started: float, num_devices: int, earlier_device_s: float = 0.0
) -> dict[str, Limit]:
    """The budgets in time, as limits by name.

    Args:
        config: budgets.
        started: `time.monotonic()` when this job began.
        num_devices: ranks of this job.
        earlier_device_s: device-seconds that earlier jobs of this run have used.
    """
    limits: dict[str, Limit] = {}
    if config.max_hours is not None:
        limits["max_hours"] = Limit(started + config.max_hours * 3600, f"stop.max_hours: {config.max_hours:g} are over")
    device_hours = {"max_device_hours": config.max_device_hours}
    if config.max_usd is not None and config.usd_per_device_hour is not None:
        device_hours["max_usd"] = config.max_usd / config.usd_per_device_hour
    for name, hours in device_hours.items():
        if hours is not None:
            left_s = (hours * 3600 - earlier_device_s) / num_devices
            limits[name] = Limit(started + left_s, f"stop.{name}: {getattr(config, name):g} are spent", requeue=False)
    return limits


def tokens_spent(config: StopConfig, tokens: int) -> str | None:
    """The reason to stop when the budget of tokens is used up, or None."""
    if config.max_tokens is None or tokens < config.max_tokens:
        return None
    return f"stop.max_tokens: {config.max_tokens} are done"


def training_spent(config: StopConfig, seconds: float) -> str | None:
    """The reason to stop when the budget of hours in steps is used up, or None."""
    if config.max_training_hours is None or seconds < config.max_training_hours * 3600:
        return None
    return f"stop.max_training_hours: {config.max_training_hours:g} are over"
