"""Which extents are fetched in one request: neighbours of one file with small gaps, in the order of need.

Pure functions of the list; the result decides requests, never data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dstrain.data.stores import Extent

WASTE_SHARE = 1 / 16
"""Most of a request's bytes that nobody asked for; keeps a node's downloads well within 1.1 of what it needs."""


@dataclass(frozen=True)
class Request:
    """One ranged read and what it is for."""

    whole: Extent
    parts: tuple[Extent, ...]
    """In order of offset, inside `whole`."""


def windows(extents: Sequence[Extent], *, window_bytes: int) -> Iterator[list[Extent]]:
    """Cut a list, soonest first, into runs of at most `window_bytes` (or a single larger extent).

    Only neighbours that are needed at about the same time may share a request; otherwise what is needed late would take
    the room of what is needed soon.
    """
    run: list[Extent] = []
    size = 0
    for extent in extents:
        if run and size + extent.length > window_bytes:
            yield run
            run, size = [], 0
        run.append(extent)
        size += extent.length
    if run:
        yield run


def coalesce(extents: Sequence[Extent], *, range_bytes: int, gap_bytes: int) -> list[Request]:
    """Requests that cover the extents exactly once each, the soonest needed first.

    Args:
        extents: soonest first, no two the same.
        range_bytes: a request grows up to this size; a single extent may be larger.
        gap_bytes: largest gap between two parts, at most `WASTE_SHARE` of the request in all.
    """
    need = {extent: place for place, extent in enumerate(extents)}
    groups: list[list[Extent]] = []
    end = waste = 0
    for extent in sorted(need):
        gap = extent.offset - end
        if groups and (first := groups[-1][0]).name == extent.name and gap <= gap_bytes:
            whole = max(end, extent.offset + extent.length) - first.offset
            if whole <= range_bytes and waste + max(gap, 0) <= whole * WASTE_SHARE:
                groups[-1].append(extent)
                end, waste = max(end, extent.offset + extent.length), waste + max(gap, 0)
                continue
        groups.append([extent])
        end, waste = extent.offset + extent.length, 0
    requests = [Request(_hull(group), tuple(group)) for group in groups]
    return sorted(requests, key=lambda request: min(need[part] for part in request.parts))


def _hull(group: Sequence[Extent]) -> Extent:
    begin = group[0].offset
    return Extent(group[0].name, begin, max(part.offset + part.length for part in group) - begin)
