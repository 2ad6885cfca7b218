"""A workload and a site to plan with, without files."""

from __future__ import annotations

from typing import Any

from dstrain.planner.devices import find_device, find_interconnect
from dstrain.planner.network import Cluster
from dstrain.planner.plan import Site
from dstrain.planner.prices import load_prices
from dstrain.planner.workload import Workload
from tests.support.published_runs import model


def workload(name: str = "BERT-base", **changes: Any) -> Workload:
    """A run of a known model: 1,024 rows of 512, 30 % masked."""
    settings: dict[str, Any] = {
        "anatomy": model(name), "precision": "bf16", "stage": 1, "sequence_length": 512, "context": 400.0, "mask_rate": 0.3,
        "global_batch": 1024, "micro_batch": 64, "max_steps": 70_000,
        "optimizer": "adamw", "compile": "auto", "bucket_elements": 50_000_000,
        "longest_save_interval_s": 1800.0, "device_hours_per_failure": 50_000.0,
    }  # fmt: skip
    return Workload(**{**settings, **changes})


def site(device: str = "h100", *, gpus: int = 8, interconnect: str = "ib400", per_node: int = 8) -> Site:
    """A cluster with the packaged prices."""
    cluster = Cluster(find_device(device), gpus, per_node, find_interconnect(interconnect))
    return Site(cluster, load_prices(None), "the packaged price table", device_hours_per_failure=50_000.0)
