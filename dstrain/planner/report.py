"""A plan as text for people and as JSON for programs. Decides nothing.

Sizes are GiB (2^30) as nvidia-smi counts them, rates are decimal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dstrain.checkpoint.interval import hours_text
from dstrain.planner.plan import Plan
from dstrain.planner.scaling import ScaleRow
from dstrain.planner.search import Budget, Suggestions

_STEP_PARTS = ("products", "attention", "elementwise", "head", "gaps", "update", "communication")


def plan_text(plan: Plan) -> str:
    """The whole plan."""
    parts = (
        _what(plan),
        _memory(plan),
        _stages(plan),
        _time(plan),
        _traffic(plan),
        _saves(plan),
        _cost(plan),
        _notes(plan),
    )
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The same as data: bytes, seconds, FLOP/s."""
    cluster, device = plan.site.cluster, plan.site.cluster.device
    return {
        "model": {"family": plan.workload.anatomy.family, "parameters": plan.workload.anatomy.parameters},
        "cluster": {
            "device": device.name, "gpus": cluster.gpus, "gpus_per_node": cluster.per_node, "nodes": cluster.nodes,
            "interconnect": cluster.between.name,
        },
        "setting": {
            "zero_stage": plan.sharding.stage, "precision": plan.sharding.precision, "micro_batch": plan.micro_batch,
            "accumulation": plan.sharding.accumulation, "global_batch": plan.workload.global_batch,
        },
        "memory": {
            "fits": plan.fits, "capacity_bytes": plan.capacity_bytes, "total_bytes": plan.memory.total,
            "peak": plan.memory.peak, "parts": [asdict(part) for part in plan.memory.parts],
        },
        "stages": [asdict(row) for row in plan.stages],
        "step": {**asdict(plan.step), "total": plan.step.total},
        "tokens_per_second": plan.tokens_per_second,
        "utilisation": plan.utilisation,
        "collectives": [{**asdict(c), "wire_bytes": c.wire_bytes(cluster.gpus)} for c in plan.collectives],
        "communication_s": plan.communication_s,
        "reliability": asdict(plan.reliability),
        "cost": asdict(plan.cost),
        "assumptions": list(plan.workload.assumptions),
    }  # fmt: skip


def suggestions_text(found: Suggestions, budget: Budget) -> str:
    """The best setting and its runners-up, or what comes nearest."""
    limits = [f"{budget.money:,.0f} of money" if budget.money is not None else "",
              f"{budget.hours:,.1f} hours" if budget.hours is not None else ""]  # fmt: skip
    asked = " and ".join(limit for limit in limits if limit)
    if found.best:
        head = [f"cheapest settings within {asked}, of {found.looked_at} planned (same rows and steps for each):"]
        return "\n".join([*head, *_settings(found.best), "", _how(found.best[0])])
    assert found.nearest is not None
    return "\n".join([
        f"nothing is within {asked}, of {found.looked_at} settings planned; the nearest:", *_settings([found.nearest]),
        "raise the budget, or lower train.max_steps",
    ])  # fmt: skip


def scaling_text(rows: Sequence[ScaleRow], *, seed: int) -> str:
    """A simulation over numbers of nodes."""
    head = (
        f"simulated, seed {seed}: the same rows for each GPU (the global batch grows); step with the slowest node, failures and saves\n"
        "    GPUs  nodes   step s   slowest     p99  failures/day  save every   goodput (5-95 %)     tokens/s  efficiency"
    )
    lines = [
        f"{row.gpus:8,d} {row.nodes:6,d} {row.step_s:8.3f} {row.factors.mean:8.3f}x {row.factors.p99:6.3f}x "
        f"{row.failures_per_day:13.2f} {hours_text(row.interval_s):>11} {row.goodput:9.1%} "
        f"({row.goodput_low:.0%}-{row.goodput_high:.0%}) {row.tokens_per_second:12,.0f} {row.efficiency:10.1%}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def gibibytes(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"


def _what(plan: Plan) -> Iterator[str]:
    work, cluster, sharding = plan.workload, plan.site.cluster, plan.sharding
    a = work.anatomy
    yield (
        f"model        {a.family}: {a.parameters:,} parameters, {a.layers} layers of {a.hidden}, vocabulary {a.vocab:,}"
    )
    nodes = f" on {cluster.nodes} nodes, {cluster.between.title}" if cluster.nodes > 1 else ""
    yield f"devices      {cluster.gpus} × {cluster.device.title}{nodes}"
    yield (
        f"step         {work.global_batch:,} rows of {work.sequence_length} = {plan.micro_batch} rows × {sharding.accumulation} "
        f"micro-batches × {cluster.gpus} ranks, ZeRO-{sharding.stage}, {sharding.precision}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    moment = "in the backward" if plan.memory.peak == "backward" else "when gradients are reduced"
    yield (
        f"memory       {gibibytes(plan.memory.total)} of {gibibytes(plan.capacity_bytes)} a rank: {verdict} "
        f"(highest {moment}; 6 % are left to the allocator)"
    )
    for part in plan.memory.at_peak():
        yield f"  {part.name:22} {gibibytes(part.num_bytes):>12}"


def _stages(plan: Plan) -> Iterator[str]:
    if not plan.stages:
        return
    yield "ZeRO stage   memory a rank   at least   largest micro-batch   sent a step by a rank   step"
    for row in plan.stages:
        mark = "*" if row.stage == plan.sharding.stage else " "
        largest = f"{row.largest_micro_batch} rows" if row.largest_micro_batch else "none fits"
        yield (
            f"  {mark} {row.stage}         {gibibytes(row.total_bytes):>12} {gibibytes(row.states_bytes):>11} {largest:>20} "
            f"{row.wire_bytes / 1e6:17,.1f} MB {row.step_s:11.3f} s"
        )


def _time(plan: Plan) -> Iterator[str]:
    yield (
        f"time         {plan.step.total:.3f} s a step, {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.site.cluster.gpus:,.0f} a GPU, {plan.utilisation:.1%} of the half-precision peak"
    )
    for name in _STEP_PARTS:
        seconds = getattr(plan.step, name)
        yield f"  {name:22} {1e3 * seconds:9.2f} ms {seconds / plan.step.total:7.1%}"


def _traffic(plan: Plan) -> Iterator[str]:
    if not plan.collectives:
        return
    yield f"traffic      {1e3 * plan.communication_s:.2f} ms of collectives a step"
    for c in plan.collectives:
        yield f"  {c.kind:22} {c.num_bytes / 1e6:9,.1f} MB in about {c.calls} calls"


def _saves(plan: Plan) -> Iterator[str]:
    safe = plan.reliability
    yield (
        f"saves        one every {hours_text(safe.interval_s)}: {gibibytes(safe.checkpoint_bytes)}, {safe.save_s:.2f} s of stall, "
        f"{safe.durable_s:.0f} s to disk beside the training"
    )
    yield (
        f"failures     one every {hours_text(safe.mean_failure_s)} expected; restart {hours_text(safe.restart_s)}; "
        f"goodput {safe.goodput:.2%}"
    )


def _cost(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    billions = cost.tokens / 1e9
    yield (
        f"run          {cost.steps:,} steps, {_amount(billions)} billion tokens: {_amount(cost.hours)} hours, "
        f"{_amount(cost.gpu_hours)} GPU-hours, {_amount(cost.money)} {cost.currency}, {_amount(cost.kilowatt_hours)} kWh"
    )
    yield (
        f"             for a billion tokens: {_amount(cost.gpu_hours / billions)} GPU-hours, "
        f"{_amount(cost.money / billions)} {cost.currency}"
    )


def _amount(value: float) -> str:
    """Three digits or more, never 0 for what is not."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def _notes(plan: Plan) -> Iterator[str]:
    for text in plan.workload.assumptions:
        yield f"assumed      {text}"
    yield f"prices       {plan.site.prices_source}" + (
        f" as of {plan.site.prices.as_of}" if plan.site.prices.as_of else ""
    )
    yield f"device data  {plan.site.cluster.device.source}"
    if not plan.fits:
        best = next((row for row in plan.stages if row.stage == plan.sharding.stage), None)
        others = [row.stage for row in plan.stages if row.largest_micro_batch]
        if best is not None and best.largest_micro_batch:
            yield f"advice       set train.micro_batch to {best.largest_micro_batch} or less; the results stay the same"
        elif others:
            yield f"advice       set engine.zero_stage to {others[0]}: nothing fits at stage {plan.sharding.stage}"
        else:
            yield "advice       no stage fits: more GPUs, larger ones, or a shorter data.sequence_length"


def _settings(plans: Sequence[Plan]) -> Iterator[str]:
    yield "      money      hours  GPUs               stage  micro-batch  accumulation  tokens/s"
    for p in plans:
        yield (
            f"{p.cost.money:11,.0f} {p.cost.hours:10,.1f}  {p.site.cluster.gpus:5d} × {p.site.cluster.device.name:10} "
            f"{p.sharding.stage:5d} {p.micro_batch:12d} {p.sharding.accumulation:13d} {p.tokens_per_second:12,.0f}"
        )


def _how(plan: Plan) -> str:
    return (
        f"to run it: {plan.site.cluster.gpus} × {plan.site.cluster.device.name} with engine.zero_stage={plan.sharding.stage} "
        f"train.micro_batch={plan.micro_batch}"
    )
