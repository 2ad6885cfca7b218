"""How long to wait between checkpoints, and what share of the time is then useful: Young's and Daly's formulas. Pure.

All times are seconds. C is what a save costs the training (the stall of an asynchronous one), M the mean time between
interruptions, R the time from an interruption to the next useful step, tau the time between saves.
"""

from __future__ import annotations

import math

OVERHEAD_LIMIT = 0.01
"""Largest share of the time that saves may take because of the cap on the interval."""


def young(cost_s: float, mean_failure_s: float) -> float:
    """Young's interval: sqrt(2 C M)."""
    return math.sqrt(2 * cost_s * mean_failure_s)


def daly(cost_s: float, mean_failure_s: float) -> float:
    """Daly's higher-order interval; M where a save costs twice the time between interruptions or more."""
    if cost_s >= 2 * mean_failure_s:
        return mean_failure_s
    x = cost_s / (2 * mean_failure_s)
    return young(cost_s, mean_failure_s) * (1 + math.sqrt(x) / 3 + x / 9) - cost_s


def availability_optimal(cost_s: float, detect_s: float, restart_s: float) -> float:
    """Interval that maximises availability whatever the failure rate (Saxena et al., 2410.18124).

    Args:
        cost_s: of a save.
        detect_s: time between interruptions in which the loss is counted, Tf in the paper.
        restart_s: Tr.
    """
    return cost_s + math.sqrt(2 * (detect_s + restart_s) * cost_s + cost_s**2)


def goodput(tau_s: float, *, cost_s: float, mean_failure_s: float, restart_s: float) -> float:
    """Expected share of useful time, exact for exponential interruptions, which may also hit saves and restarts."""
    period = (tau_s + cost_s) / mean_failure_s
    if period > 700 or restart_s / mean_failure_s > 700:  # e^x beyond float: no save ever ends
        return 0.0
    return tau_s / (mean_failure_s * math.exp(restart_s / mean_failure_s) * math.expm1(period))


def goodput_first_order(tau_s: float, *, cost_s: float, mean_failure_s: float, restart_s: float) -> float:
    """The same to first order in C/tau and (R + tau)/M; never below 0."""
    lost = (restart_s + (tau_s + cost_s) / 2) / mean_failure_s
    return max(0.0, (1 - lost) / (1 + cost_s / tau_s))


def mean_failure_s(
    *, devices: int, device_hours_per_failure: float, interruptions: int = 0, run_hours: float = 0.0
) -> float:
    """Mean time between interruptions: the planning value, moved by what the run has seen.

    The planning value counts as one interruption already seen, so that a first failure does not halve it out of nowhere and
    a long run is judged by its own record.

    Args:
        devices: accelerators (or hosts, on CPUs) of the job.
        device_hours_per_failure: planning value, 25,000 to 80,000 for GPUs.
        interruptions: that this run has had, over all restarts.
        run_hours: wall time it has been up, over all restarts.
    """
    planned_hours = device_hours_per_failure / devices
    return 3600 * (planned_hours + run_hours) / (1 + interruptions)


def save_interval(cost_s: float, *, mean_failure_s: float, longest_s: float, durable_s: float = 0.0) -> float:
    """The interval to use: Daly's, at most `longest_s`, and only as short as its cost and its writing allow.

    The cap limits what an interruption costs. It may not push the share of saves above OVERHEAD_LIMIT; the optimum may, where
    interruptions are so frequent that it pays. A save must be durable before the next begins.

    Args:
        cost_s: of a save.
        mean_failure_s: M.
        longest_s: cap.
        durable_s: from the start of a save until it is in its place.
    """
    capped = max(longest_s, cost_s / OVERHEAD_LIMIT)
    return max(min(daly(cost_s, mean_failure_s), capped), durable_s, cost_s)


def hours_text(seconds: float) -> str:
    """A time for people: seconds, minutes or hours, whichever gives a small number."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
