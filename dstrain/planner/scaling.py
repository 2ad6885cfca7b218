"""One workload on more and more nodes: step time, stragglers, failures and goodput, simulated.

Weak scaling: every GPU keeps its rows of a step, so the global batch grows with the GPUs. What that does to learning is not
judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dstrain.planner.plan import Site, make_plan, on_cluster
from dstrain.planner.simulate import Failures, Noise, StepFactors, run_with_failures, step_factors
from dstrain.planner.workload import Workload

SIMULATED_DAYS = 30.0


@dataclass(frozen=True)
class ScaleRow:
    """One number of GPUs."""

    gpus: int
    nodes: int
    step_s: float
    """Undisturbed step."""
    factors: StepFactors
    """By which the slowest node lengthens it."""
    failures_per_day: float
    interval_s: float
    goodput: float
    """Mean of the replications."""
    goodput_low: float
    goodput_high: float
    """5th and 95th percentile of the replications."""
    tokens_per_second: float
    """With stragglers, failures and saves."""
    efficiency: float
    """Tokens of a GPU against those of the first row's."""


def gpu_counts(first: int, largest: int) -> list[int]:
    """Doubled from the first to the largest."""
    counts = [first]
    while counts[-1] * 2 <= largest:
        counts.append(counts[-1] * 2)
    return counts


def simulate_scaling(
    workload: Workload, site: Site, counts: Sequence[int], *, noise: Noise, seed: int = 0, replications: int = 200
) -> list[ScaleRow]:
    """Simulate 30 days of the workload at each number of GPUs.

    Args:
        workload: at the site's own number of GPUs; its rows for each GPU are kept.
        site: where; its number of GPUs is replaced.
        counts: numbers of GPUs.
        noise: of steps.
        seed: of all draws.
        replications: runs for each number.

    Raises:
        ConfigError: failures come faster than saves.
    """
    rows_of_rank = -(-workload.global_batch // site.cluster.gpus)
    found: list[ScaleRow] = []
    for gpus in counts:
        grown = replace(workload, global_batch=rows_of_rank * gpus)
        plan = make_plan(grown, on_cluster(site, replace(site.cluster, gpus=gpus)), compare_stages=False)
        factors = step_factors(noise, nodes=plan.site.cluster.nodes, seed=seed)
        safe = plan.reliability
        failures = Failures(safe.mean_failure_s, safe.restart_s, safe.interval_s, safe.save_s)
        outcome = run_with_failures(SIMULATED_DAYS * 86400, failures, replications=replications, seed=seed)
        low, high = np.percentile(outcome.goodput, [5, 95])
        mean = outcome.useful_s / float(outcome.wall_s.mean())
        rate = plan.tokens_per_second / factors.mean * mean
        base = found[0].tokens_per_second / found[0].gpus if found else rate / gpus
        found.append(ScaleRow(
            gpus=gpus, nodes=plan.site.cluster.nodes, step_s=plan.step.total, factors=factors,
            failures_per_day=86400 * float(outcome.failures.sum() / outcome.wall_s.sum()), interval_s=safe.interval_s,
            goodput=mean, goodput_low=float(low), goodput_high=float(high), tokens_per_second=rate,
            efficiency=rate / gpus / base,
        ))  # fmt: skip
    return found
