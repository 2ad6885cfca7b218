"""The checkpoint section of a run's configuration: when to save, how many to keep, where a second copy goes.

Settings only; the decisions are `interval`, `retention` and `mirror`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.base.errors import DstrainError
from dstrain.base.locations import RemoteUrl, parse_location

_READ_ONLY_SCHEMES = ("http", "https", "hf")


class CheckpointConfig(Config):
    """When checkpoints are taken, how many are kept, and where the second copy lies."""

    every_steps: int | Literal["auto"] | None = "auto"
    """Optimizer steps between checkpoints. auto: chosen from what a save costs and how often runs are interrupted, at most
    `longest_minutes` apart. null: no checkpoint between the first step and the end, except on a stop request or with `every_minutes`."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes of wall time between checkpoints, in place of steps."""
    longest_minutes: float = Field(default=30.0, gt=0)
    """Most minutes between checkpoints when the interval is chosen (auto): the work that an interruption may cost."""
    gpu_hours_per_failure: float = Field(default=50_000.0, gt=0)
    """Device-hours between unexpected interruptions that auto expects before the run has a history of its own; published
    clusters lie between 25,000 and 80,000."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept. The best by the evaluation metric is kept besides, when fine-tuning."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep, for good, every checkpoint whose step is a multiple of this; null keeps none for good."""
    asynchronous: bool = True
    """Go on training while a checkpoint is hashed, written and published; false waits for it."""
    verify_after_write: bool = True
    """Read each file back from the disk and compare its hash before the checkpoint is published; costs no training time."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that every rank has to write its file before the save is given up. Five times the slowest save so far, if that is more."""
    mirror: str | None = None
    """Folder on another disk, or s3://, gs://, az:// or abfs:// URL, to which each checkpoint is copied after it is published."""
    mirror_keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept in the mirror; `keep_every` holds there too."""
    trust_owner: bool = False
    """Read checkpoints that belong to another user than this one or root."""

    @model_validator(mode="after")
    def _one_interval(self) -> CheckpointConfig:
        if isinstance(self.every_steps, int):
            if self.every_steps < 1:
                raise ValueError(
                    f"every_steps: {self.every_steps} is not a number of steps: give 1 or more, auto or null"
                )
            if self.every_minutes is not None:
                raise ValueError(
                    f"every_steps: {self.every_steps} and every_minutes: {self.every_minutes:g} contradict each other: set one"
                )
        return self

    @model_validator(mode="after")
    def _writable_mirror(self) -> CheckpointConfig:
        if self.mirror is None:
            return self
        try:
            place = parse_location(self.mirror)
        except DstrainError as error:
            raise ValueError(f"mirror: {error}") from None
        if isinstance(place, RemoteUrl) and place.scheme in _READ_ONLY_SCHEMES:
            raise ValueError(
                f"mirror: {place}: {place.scheme}:// cannot be written: use a folder, s3://, gs://, az:// or abfs://"
            )
        return self

    @property
    def interval(self) -> Literal["steps", "minutes", "auto", "end"]:
        """What decides when a checkpoint is due."""
        if isinstance(self.every_steps, int):
            return "steps"
        if self.every_minutes is not None:
            return "minutes"
        return "auto" if self.every_steps == "auto" else "end"
