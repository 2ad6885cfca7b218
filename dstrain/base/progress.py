"""Progress bars with ETA for long work: a live bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

ItemT = TypeVar("ItemT")


def bar(*, total: int | float | None, description: str, unit: str, scale: bool = True, quiet: bool = False) -> Any:
    """A tqdm bar; call `.update(n)` and `.close()`, or use it as a context manager.

    Args:
        total: units to do, or None when unknown.
        description: what is going on, in a few words.
        unit: what is counted, e.g. "tok".
        scale: print 1.2M instead of 1200000.
        quiet: print nothing (ranks above 0, tests).
    """
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=scale,
        disable=quiet,
        file=sys.stderr,
        mininterval=0.2 if live else 5.0,
        maxinterval=10.0,
        dynamic_ncols=live,
        ncols=None if live else 110,
        leave=True,
    )


def track(
    items: Iterable[ItemT], *, total: int | None, description: str, unit: str, quiet: bool = False
) -> Iterator[ItemT]:
    """Yield from `items` under a bar."""
    with bar(total=total, description=description, unit=unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.update(1)
