"""What a run ran on: versions, machine and threads, written beside its results so that numbers can be compared later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
from typing import Any

import psutil
import torch

from dstrain.base.device import device_name
from dstrain.base.world import World
from dstrain.launcher.rank_environment import ranges

_PACKAGES = (
    "dstrain",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "webdataset",
    "numpy",
    "safetensors",
)


def package_versions() -> dict[str, str]:
    """Installed versions of what matters to the numbers."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def describe_environment(world: World, *, device: str, precision: str) -> dict[str, Any]:
    """JSON-able facts about this process's machine."""
    return {
        "packages": package_versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": device_name("cpu"),
        "device": device_name(device) if device == "cuda" else "cpu",
        "precision": precision,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "affinity": ranges(tuple(os.sched_getaffinity(0))),
        "world_size": world.size,
        "launcher": world.launcher,
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }
