"""SLURM's time limits as sbatch reads them, and whether one leaves room for a run to save before it ends. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dstrain.base.errors import ConfigError

SIGNAL_LEAD_S = 300
"""Seconds before the end at which the batch scripts have SLURM signal the ranks: the second net."""
_LATEST_SAVES = 20


def parse_time_limit(text: str) -> float:
    """Seconds of `minutes`, `m:s`, `h:m:s`, `days-h`, `days-h:m` or `days-h:m:s`; infinity for UNLIMITED.

    Raises:
        ConfigError: it is none of these, or nothing.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,6}))?(?::(\d{1,6}))?", text, re.ASCII)
    if match is None:
        raise ConfigError(f"--time {text[:40]!r}: write hours:minutes:seconds, days-hours:minutes, or minutes")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    total = float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
    if total <= 0:
        raise ConfigError(f"--time {text!r}: no time at all")
    return total


def longest_save_s(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds of the longest of a run's latest saves; 0 when there was none."""
    saves = [event.get("seconds") for event in events if event.get("event") == "saved"]
    return max(
        (float(s) for s in saves[-_LATEST_SAVES:] if isinstance(s, (int, float)) and math.isfinite(s)), default=0.0
    )


def check_time_limit(text: str, *, margin_s: float, save_s: float) -> None:
    """Refuse a limit that a run would spend on leaving: it stops a margin and a save before the end.

    Args:
        text: `--time`.
        margin_s: `stop.margin_s`.
        save_s: see `longest_save_s`.

    Raises:
        ConfigError: with the least limit that leaves as much for training again.
    """
    limit_s = parse_time_limit(text)
    needs_s = margin_s + save_s
    if limit_s <= needs_s:
        measured = f" and a save ({save_s:.0f} s, measured in this run's events)" if save_s else ""
        raise ConfigError(
            f"--time {text} ({limit_s:.0f} s): the run leaves stop.margin_s ({margin_s:.0f} s){measured} before the end, so nothing "
            f"would be left; give at least --time {math.ceil(2 * needs_s / 60)}"
        )


def check_grace(grace_s: float, *, save_s: float) -> None:
    """Refuse a grace in which the run's saves do not fit: a stop would kill it while it writes.

    Raises:
        ConfigError: with a grace that fits.
    """
    if save_s > grace_s:
        raise ConfigError(
            f"--grace {grace_s:g}: saves of this run take up to {save_s:.0f} s (measured in its events), so that it would be killed "
            f"while it saves; give --grace {math.ceil(1.5 * save_s)} or more"
        )


def signal_option(text: str) -> str | None:
    """`--signal=...` for a limit in which the scripts' own lead would be most of it; None leaves the script's."""
    limit_s = parse_time_limit(text)
    if limit_s >= 4 * SIGNAL_LEAD_S:
        return None
    return f"--signal=USR1@{max(1, int(limit_s // 4))}"
