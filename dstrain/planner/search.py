"""The cheapest setting that fits the budgets: every GPU count, type, stage and micro-batch that makes sense, planned and ranked.

Exhaustive over small lists, no heuristics: a plan takes a millisecond. The rows of a step and their number stay as the run's
configuration says, so that no suggestion changes what is learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dstrain.base.errors import ConfigError
from dstrain.planner.devices import DEVICES, Device
from dstrain.planner.network import Cluster
from dstrain.planner.plan import STAGES, Plan, Site, make_plan, on_cluster, row_of
from dstrain.planner.workload import Workload
from dstrain.train.footprint import largest_micro_batch
from dstrain.train.traffic import Sharding


@dataclass(frozen=True)
class Budget:
    """What a run may cost; None is no limit."""

    money: float | None = None
    hours: float | None = None
    """Wall time."""

    def allows(self, plan: Plan) -> bool:
        """Whether a plan stays within."""
        return (self.money is None or plan.cost.money <= self.money) and (
            self.hours is None or plan.cost.hours <= self.hours
        )


@dataclass(frozen=True)
class Suggestions:
    """What a search found, best first."""

    best: tuple[Plan, ...]
    """Within the budgets, cheapest first; one for each device and number of them."""
    nearest: Plan | None
    """Where nothing is within: the fastest of those within the money, or the cheapest of those within the time, or the cheapest."""
    looked_at: int
    """Settings planned."""


def search(
    workload: Workload, site: Site, budget: Budget, *, devices: Iterable[Device], most_gpus: int, keep: int = 5
) -> Suggestions:
    """Plan every sensible setting.

    Args:
        workload: the run.
        site: links, prices and failures; its cluster gives GPUs of a node and the interconnect.
        budget: what is allowed.
        devices: types to look at; those without a price are left out.
        most_gpus: largest number of GPUs.
        keep: suggestions returned.

    Raises:
        ConfigError: no device has a price, or nothing fits any device.
    """
    priced = [device for device in devices if device.name in site.prices.devices]
    if not priced:
        raise ConfigError(f"{site.prices_source}: devices: none of the devices to choose from has a price; add one")
    plans = [plan for device in priced for plan in _plans_on(workload, _site_with(site, device), most_gpus)]
    if not plans:
        names = ", ".join(device.name for device in priced)
        raise ConfigError(
            f"the model does not fit {names} at any stage with up to {most_gpus} GPUs; raise --max-gpus, add a larger device to the "
            "prices, or shorten data.sequence_length"
        )
    within = sorted(
        (p for p in plans if budget.allows(p)), key=lambda p: (p.cost.money, p.cost.hours, p.site.cluster.gpus)
    )
    return Suggestions(tuple(within[:keep]), None if within else _nearest(plans, budget), len(plans))


def suggestable(names: Iterable[str] | None) -> tuple[Device, ...]:
    """The GPUs of the table, or those of the given names."""
    if names is None:
        return tuple(device for device in DEVICES.values() if device.is_gpu)
    return tuple(DEVICES[name] for name in names)


def gpu_counts(per_node: int, most: int, rows: int) -> list[int]:
    """Powers of two within a node, then whole nodes: doubled, and three quarters in between; at most one row a GPU."""
    counts = {n for n in (1, 2, 4, per_node) if n <= per_node}
    nodes = 1
    while nodes * per_node <= most:
        counts |= {nodes * per_node, 3 * nodes * per_node // 2 if nodes > 1 else per_node}
        nodes *= 2
    return sorted(n for n in counts if n <= min(most, rows))


def _site_with(site: Site, device: Device) -> Site:
    """The place with another device; what was measured belongs to the device it was measured on, and only to that."""
    if device.name == site.cluster.device.name:
        return site
    return replace(on_cluster(site, replace(site.cluster, device=device)), stack=None)


def _plans_on(workload: Workload, site: Site, most_gpus: int) -> Iterator[Plan]:
    if site.cluster.device.name == "v100" and workload.precision == "bf16":
        workload = replace(workload, precision="fp16")
    for gpus in gpu_counts(site.cluster.per_node, most_gpus, workload.global_batch):
        place = on_cluster(site, replace(site.cluster, gpus=gpus))
        found = [plan for stage in STAGES for plan in _plans_at(workload, place, stage)]
        if found:
            yield min(found, key=lambda plan: (plan.cost.money, plan.sharding.stage))


def _plans_at(workload: Workload, site: Site, stage: int) -> Iterator[Plan]:
    """The largest micro-batch that fits, and the largest one that divides a rank's rows evenly."""
    cluster: Cluster = site.cluster
    rows = -(-workload.global_batch // cluster.gpus)
    sharding = Sharding(
        stage, workload.precision, cluster.gpus, 2, workload.bucket_elements, optimizer=workload.optimizer
    )
    largest = largest_micro_batch(
        workload.anatomy, sharding, row_of(workload), device="cuda" if cluster.device.is_gpu else "cpu",
        capacity_bytes=cluster.device.memory_bytes, rows=rows,
    )  # fmt: skip
    if largest == 0:
        return
    steps = -(-rows // largest)
    for micro_batch in {largest, -(-rows // steps)}:
        plan = make_plan(workload, site, stage=stage, micro_batch=micro_batch, compare_stages=False)
        # Stage 0 sums the gradients of several micro-batches in half precision: cheaper, and other numbers.
        rounds = stage == 0 and workload.precision != "fp32" and plan.sharding.accumulation > 1
        if plan.fits and not rounds:
            yield plan


def _nearest(plans: list[Plan], budget: Budget) -> Plan:
    if budget.money is not None and (cheap := [p for p in plans if p.cost.money <= budget.money]):
        return min(cheap, key=lambda p: p.cost.hours)
    if budget.hours is not None and (quick := [p for p in plans if p.cost.hours <= budget.hours]):
        return min(quick, key=lambda p: p.cost.money)
    return min(plans, key=lambda p: p.cost.money)
