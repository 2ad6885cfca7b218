"""A run on thousands of GPUs, simulated: steps that wait for the slowest node, and failures that throw work away.

Vectorised and exact where a formula allows it: the largest of n noises is drawn at once from its own distribution, not as n numbers, so
16,384 GPUs cost what 8 do. The same seed gives the same numbers. Not simulated: correlated failures of racks, networks that slow down
for everyone, data that does not come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from dstrain.base.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """How the time of a step varies from node to node and step to step, as factors of the undisturbed time."""

    sigma: float = 0.02
    """Standard deviation of the logarithm of each node's time: jitter of clocks, memory and Python."""
    stall_share: float = 2e-5
    """Probability that a node stalls in a step (a collection of garbage, a system service, a retried packet)."""
    stall_factor: float = 1.5
    """Smallest factor of a stall; larger ones follow a power law."""
    stall_tail: float = 2.5
    """Exponent of that power law (Pareto); smaller is heavier. Above 1, so that the mean exists."""
    slow_nodes: int = 0
    """Nodes that are slow all the time."""
    slow_factor: float = 1.2
    """Their factor."""

    def __post_init__(self) -> None:
        if self.sigma < 0 or not 0 <= self.stall_share <= 1 or self.stall_tail <= 1 or self.slow_nodes < 0:
            raise ConfigError(
                f"noise: sigma={self.sigma} must be 0 or more, stall_share={self.stall_share} between 0 and 1, "
                f"stall_tail={self.stall_tail} above 1, slow_nodes={self.slow_nodes} 0 or more"
            )


@dataclass(frozen=True)
class Failures:
    """What interrupts a run and what that costs, in seconds."""

    mean_failure_s: float
    """Between interruptions of the whole job."""
    restart_s: float
    """From an interruption to the next useful step."""
    interval_s: float
    """Useful seconds between saves."""
    save_s: float
    """That a save stops training."""


@dataclass(frozen=True)
class StepFactors:
    """How much longer steps take than on one undisturbed node."""

    mean: float
    median: float
    p99: float
    largest: float


@dataclass(frozen=True)
class Outcome:
    """Replicated runs, in the order of their replication."""

    wall_s: Floats
    """(R,) wall time of each."""
    failures: npt.NDArray[np.int64]
    """(R,) interruptions of each."""
    useful_s: float
    """Work of one run, stragglers included."""

    @property
    def goodput(self) -> Floats:
        """(R,) useful share of each run's wall time."""
        return self.useful_s / self.wall_s


def slowest(noise: Noise, *, nodes: int, steps: int, rng: np.random.Generator) -> Floats:
    """(steps,) factors by which steps of `nodes` nodes are longer: the largest of the nodes' factors in each."""
    slow = min(noise.slow_nodes, nodes)
    stalled = rng.binomial(nodes, noise.stall_share, size=steps) if noise.stall_share else np.zeros(steps, np.int64)
    factors = _largest_lognormal(noise.sigma, nodes - slow, steps, rng)
    if slow:
        factors = np.maximum(factors, noise.slow_factor * _largest_lognormal(noise.sigma, slow, steps, rng))
    hit = np.flatnonzero(stalled)
    if len(hit):
        factors[hit] = np.maximum(factors[hit], _largest_stall(noise, stalled[hit], rng))
    return factors


def _largest_lognormal(sigma: float, nodes: int, steps: int, rng: np.random.Generator) -> Floats:
    if nodes == 0:
        return np.zeros(steps)
    # The largest of n uniforms is one uniform to the power 1/n; its quantile is the largest of n normals.
    largest = rng.random(steps) ** (1.0 / nodes)
    factors: Floats = np.exp(sigma * ndtri(np.clip(largest, 1e-300, 1 - 1e-16)))
    return factors


def _largest_stall(noise: Noise, counts: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
    largest = rng.random(len(counts)) ** (1.0 / counts)
    return noise.stall_factor * (1 - largest) ** (-1.0 / noise.stall_tail)


def step_factors(noise: Noise, *, nodes: int, steps: int = 20_000, seed: int = 0) -> StepFactors:
    """Summary of `slowest` over many steps."""
    drawn = slowest(noise, nodes=nodes, steps=steps, rng=np.random.default_rng([seed, nodes]))
    median, p99 = np.percentile(drawn, [50, 99])
    return StepFactors(mean=float(drawn.mean()), median=float(median), p99=float(p99), largest=float(drawn.max()))


def run_with_failures(useful_s: float, failures: Failures, *, replications: int = 200, seed: int = 0) -> Outcome:
    """Replicate a run of `useful_s` seconds of work that is interrupted at exponential times.

    Work since the last save is lost; interruptions also hit saves and restarts. All replications go from one interruption to the next
    at the same time.

    Raises:
        ConfigError: interruptions come so fast that no save ever ends.
    """
    period = failures.interval_s + failures.save_s
    if period > 30 * failures.mean_failure_s:
        raise ConfigError(
            f"simulation: a save every {failures.interval_s:.0f} s and an interruption every {failures.mean_failure_s:.0f} s: no run "
            "would end; save more often or use fewer devices"
        )
    rng = np.random.default_rng([seed, replications])
    done, wall = np.zeros(replications), np.zeros(replications)
    count = np.zeros(replications, np.int64)
    active, restart = np.arange(replications), 0.0
    while len(active):
        until = rng.exponential(failures.mean_failure_s, len(active))
        left = useful_s - done[active]
        # The last piece needs no save: the run ends with it.
        saves = np.ceil(left / failures.interval_s) - 1
        needed = restart + left + saves * failures.save_s
        ends = until >= needed
        wall[active] += np.where(ends, needed, until)
        kept = np.floor(np.maximum(0.0, until - restart) / period) * failures.interval_s
        done[active] += np.where(ends, left, np.minimum(kept, saves * failures.interval_s))
        count[active] += ~ends
        active, restart = active[~ends], failures.restart_s
    return Outcome(wall, count, useful_s)
