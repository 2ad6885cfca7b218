"""What is looked at before the first step, and from where on it counts as a fault: settings only."""

from __future__ import annotations

from pydantic import Field

from dstrain.base.config import Config


class StartConfig(Config):
    """Checks before the first step; `dstrain doctor` makes the same ones on demand (docs/doctor.md)."""

    join_s: float = Field(default=180.0, gt=0.0)
    """Seconds that ranks wait for one another at the start before the missing ones are named. More than what the slowest host needs
    longer than the fastest to load Python's packages."""
    clock: bool = True
    """Compare the hosts' clocks."""
    clock_warn_s: float = Field(default=1.0, gt=0.0)
    """Seconds between two clocks from which on it is said."""
    clock_limit_s: float | None = Field(default=60.0, gt=0.0)
    """Seconds from which on the run does not begin: logs cannot be compared and stores refuse signatures; null never refuses."""
    disk: bool = True
    """Compare the free space of the run folder and of the mirror with what a checkpoint needs."""
    shared_folder: bool = True
    """Look whether every host sees the run folder that rank 0 writes to, and rank 0 what they write."""
    shared_folder_s: float = Field(default=10.0, ge=0.0)
    """Seconds that a file may take to appear on another host; network file systems answer from caches."""
    network: bool = True
    """Time all-reduces, small and large, and between neighbours, and compare them with one another and with the link's speed."""
    network_share: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of what a link of that speed should give below which it is said; only where the speed is known."""
    gpu: bool = True
    """Ask nvidia-smi for errors, temperature, throttling, memory and other processes, and multiply matrices whose product is known."""
    gpu_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Speed of a GPU, compared with the median of its kind in this job, below which the run does not begin."""
