"""A run, planned: memory by part and stage, step time, traffic, saves and failures, hours, money and power.

Joins the pure models below it; has no formula of its own. A plan is data: `report` turns it into text, the command into JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dstrain.base.errors import ConfigError
from dstrain.monitor.flops import ModelShape, flops_per_token
from dstrain.planner.network import Cluster, collective_seconds
from dstrain.planner.prices import PriceTable, kilowatt_hours, price_of
from dstrain.planner.reliability import Reliability, reliability
from dstrain.planner.steptime import DSTRAIN, DSTRAIN_COMPILED, Stack, StepTime, step_time
from dstrain.planner.workload import Workload
from dstrain.train.footprint import RESERVE, Batch, Footprint, footprint, largest_micro_batch, scaled
from dstrain.train.traffic import Collective, Sharding, step_collectives, wire_bytes

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Site:
    """Where a run is planned to run, and what the place is like."""

    cluster: Cluster
    prices: PriceTable
    prices_source: str
    device_hours_per_failure: float
    restart_s: float = 300.0
    """From an interruption to the next useful step: detection, queue, start, load."""
    storage_bytes_s: float = 2e9
    """Durable writes of the whole job, bytes/s."""
    stack: Stack | None = None
    """A measured efficiency class; None is dstrain's own, compiled where a run would compile its blocks."""


@dataclass(frozen=True)
class StageRow:
    """One ZeRO stage at the plan's GPUs."""

    stage: int
    total_bytes: int
    """At the micro-batch of the plan."""
    states_bytes: int
    """Weights, gradients, optimizer: what no smaller micro-batch saves."""
    largest_micro_batch: int
    """Most rows of a forward that fit; 0 where not even one does."""
    wire_bytes: float
    """That each rank sends in a step, in rings."""
    step_s: float


@dataclass(frozen=True)
class Cost:
    """Of the whole run."""

    steps: int
    tokens: int
    useful_hours: float
    """Of steps alone."""
    hours: float
    """Wall time: saves and failures included."""
    gpu_hours: float
    money: float
    currency: str
    kilowatt_hours: float


@dataclass(frozen=True)
class Plan:
    """Everything about a run at one setting."""

    workload: Workload
    site: Site
    sharding: Sharding
    micro_batch: int
    batch: Batch
    memory: Footprint
    capacity_bytes: int
    step: StepTime
    collectives: tuple[Collective, ...]
    communication_s: float
    """Of all collectives of a step, hidden or not."""
    tokens_per_second: float
    """Of all GPUs together, while steps run."""
    utilisation: float
    """Useful operations over the devices' half-precision peak."""
    reliability: Reliability
    cost: Cost
    stages: tuple[StageRow, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is enough, a reserve left out."""
        return self.memory.total <= self.capacity_bytes * (1 - RESERVE)


def accumulation_of(workload: Workload, *, ranks: int, micro_batch: int) -> int:
    """Micro-batches of a step on the rank with most rows.

    Raises:
        ConfigError: fewer rows than ranks.
    """
    if ranks > workload.global_batch:
        raise ConfigError(
            f"--gpus: {ranks} GPUs for train.global_batch={workload.global_batch} rows: some would have nothing to do; use at most "
            f"{workload.global_batch} GPUs or raise train.global_batch"
        )
    rows = -(-workload.global_batch // ranks)
    return -(-rows // micro_batch)


def row_of(workload: Workload) -> Batch:
    """One packed row as a batch."""
    tokens = workload.sequence_length
    return Batch(tokens, round(tokens * workload.mask_rate), workload.context)


def make_plan(
    workload: Workload,
    site: Site,
    *,
    stage: int | None = None,
    micro_batch: int | None = None,
    compare_stages: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        workload: the run.
        site: where.
        stage: ZeRO stage in place of the configured one.
        micro_batch: rows of a forward in place of the configured ones.
        compare_stages: also look at the other stages.

    Raises:
        ConfigError: more GPUs than rows, no price for the device, or failures faster than saves.
    """
    ranks, device = site.cluster.gpus, site.cluster.device
    rows_of_rank = -(-workload.global_batch // ranks)
    rows = min(micro_batch or workload.micro_batch, rows_of_rank)
    accumulation = accumulation_of(workload, ranks=ranks, micro_batch=rows)
    sharding = Sharding(
        stage if stage is not None else workload.stage,
        workload.precision,
        ranks,
        accumulation,
        workload.bucket_elements,
        optimizer=workload.optimizer,
    )
    batch = scaled(row_of(workload), rows)
    memory = footprint(workload.anatomy, sharding, batch, device=_kind(site))
    step = _step(workload, site, sharding, rows_of_rank, rows)
    collectives = step_collectives(workload.anatomy, sharding)
    safety = reliability(
        workload.anatomy, ranks=ranks, is_gpu=device.is_gpu, device_hours_per_failure=site.device_hours_per_failure,
        restart_s=site.restart_s, storage_bytes_s=site.storage_bytes_s, longest_s=workload.longest_save_interval_s,
    )  # fmt: skip
    rate = workload.global_batch * workload.sequence_length / step.total
    return Plan(
        workload=workload, site=site, sharding=sharding, micro_batch=rows, batch=batch, memory=memory,
        capacity_bytes=device.memory_bytes, step=step, collectives=collectives,
        communication_s=sum(collective_seconds(c, site.cluster) for c in collectives), tokens_per_second=rate,
        utilisation=rate * useful_flops(workload) / (ranks * device.peak_flops), reliability=safety,
        cost=_cost(workload, site, step.total, safety),
        stages=tuple(_stage_row(workload, site, s, rows) for s in STAGES) if compare_stages else (),
    )  # fmt: skip


def useful_flops(workload: Workload) -> float:
    """Operations of one token as utilisation counts them (`monitor.flops`)."""
    a = workload.anatomy
    shape = ModelShape(layers=a.layers, hidden=a.hidden, intermediate=a.intermediate, vocab=a.vocab, gated=a.gated)
    return flops_per_token(shape, mean_context=a.mean_context(workload.context), scored_share=workload.mask_rate)


def _kind(site: Site) -> str:
    return "cuda" if site.cluster.device.is_gpu else "cpu"


def _step(workload: Workload, site: Site, sharding: Sharding, rows_of_rank: int, micro_batch: int) -> StepTime:
    """One step of the rank with most rows; its micro-batches are taken as equal, so that a last short one costs what it is."""
    mean_rows = rows_of_rank / sharding.accumulation
    batch = scaled(row_of(workload), min(mean_rows, micro_batch))
    stack = site.stack or _own_stack(workload, site, sharding.stage)
    return step_time(workload.anatomy, batch, sharding, site.cluster, stack=stack)


def _own_stack(workload: Workload, site: Site, stage: int) -> Stack:
    """As `train.compiling` decides it."""
    wanted = workload.compile == "blocks" or (workload.compile == "auto" and site.cluster.device.is_gpu)
    return DSTRAIN_COMPILED if wanted and stage < 3 and not workload.anatomy.quadratic else DSTRAIN


def _stage_row(workload: Workload, site: Site, stage: int, micro_batch: int) -> StageRow:
    ranks = site.cluster.gpus
    rows_of_rank = -(-workload.global_batch // ranks)
    row = row_of(workload)
    sharding = Sharding(
        stage, workload.precision, ranks, accumulation_of(workload, ranks=ranks, micro_batch=micro_batch),
        workload.bucket_elements,
        optimizer=workload.optimizer,
    )  # fmt: skip
    memory = footprint(workload.anatomy, sharding, scaled(row, micro_batch), device=_kind(site))
    nothing = footprint(workload.anatomy, sharding, scaled(row, 0), device=_kind(site))
    return StageRow(
        stage=stage, total_bytes=memory.total, states_bytes=nothing.total,
        largest_micro_batch=largest_micro_batch(
            workload.anatomy, sharding, row, device=_kind(site), capacity_bytes=site.cluster.device.memory_bytes,
            rows=rows_of_rank,
        ),
        wire_bytes=wire_bytes(step_collectives(workload.anatomy, sharding), ranks),
        step_s=_step(workload, site, sharding, rows_of_rank, micro_batch).total,
    )  # fmt: skip


def _cost(workload: Workload, site: Site, step_s: float, safety: Reliability) -> Cost:
    cluster = site.cluster
    price = price_of(site.prices, cluster.device, source=site.prices_source)
    useful = workload.max_steps * step_s / 3600
    if safety.goodput <= 0:
        raise ConfigError(
            f"an interruption every {safety.mean_failure_s:.0f} s and a save every {safety.interval_s:.0f} s: the run would never end; "
            "give --mtbf-hours of one GPU, or use fewer GPUs"
        )
    hours = useful / safety.goodput
    gpu_hours = hours * cluster.gpus
    return Cost(
        steps=workload.max_steps, tokens=workload.tokens, useful_hours=useful, hours=hours, gpu_hours=gpu_hours,
        money=gpu_hours * price.price_per_hour, currency=site.prices.currency,
        kilowatt_hours=kilowatt_hours(site.prices, price, cluster.device, device_hours=gpu_hours),
    )  # fmt: skip


def on_cluster(site: Site, cluster: Cluster) -> Site:
    """The same place with other devices."""
    return replace(site, cluster=cluster)
