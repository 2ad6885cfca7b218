"""Stretches of a file that hold wanted members: neighbours are read together, large gaps are skipped.

The rule is part of the index format (a block's checksum covers exactly these bytes), so its constant never changes
without a new format version. Knows offsets only.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

UNIT = 512
GAP_BYTES = 8192
"""Wanted members up to this far apart are read together: one more read costs about as much as 8 KiB of a local disk."""

Int64 = npt.NDArray[np.int64]


def padded_ends(offsets: Int64, lengths: Int64) -> Int64:
    """(n,) ends of payloads with their padding to whole tar units."""
    return offsets + -(-lengths // UNIT) * UNIT


def find_ranges(offsets: Int64, lengths: Int64, *, begin: int) -> Int64:
    """The stretches that hold some members and their tar headers.

    Args:
        offsets: (n,) ascending payload offsets, n ≥ 1.
        lengths: (n,) payload sizes.
        begin: where the first stretch begins, at most a header and a gap before the first payload.

    Returns:
        (m, 2) start and stop of each stretch, ascending and disjoint.
    """
    ends = padded_ends(offsets, lengths)
    breaks = np.flatnonzero(offsets[1:] - UNIT - ends[:-1] > GAP_BYTES)
    starts = np.concatenate([[begin], offsets[breaks + 1] - UNIT])
    stops = np.concatenate([ends[breaks], ends[-1:]])
    return np.stack([starts, stops], axis=1)


def begin_of(offset: int, *, previous_end: int) -> int:
    """Where a block's first stretch begins: at the end of the block before it unless a large gap lies between."""
    return previous_end if 0 <= offset - UNIT - previous_end <= GAP_BYTES else offset - UNIT


def read_range(handle: int, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of an open file; fewer if the file ends early.

    Raises:
        OSError: the device or file system failed.
    """
    data = os.pread(handle, stop - start, start)
    while len(data) < stop - start:
        more = os.pread(handle, stop - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def slice_members(data: bytes, ranges: Int64, offsets: Int64, lengths: Int64) -> list[memoryview]:
    """Payloads of members, given the bytes of their stretches back to back.

    Args:
        data: what was read of `ranges`, joined.
        ranges: (m, 2) stretches.
        offsets: (n,) payload offsets inside them.
        lengths: (n,) payload sizes.
    """
    sizes = ranges[:, 1] - ranges[:, 0]
    which = np.searchsorted(ranges[:, 0], offsets, side="right") - 1
    shift = (np.cumsum(sizes) - sizes - ranges[:, 0])[which]
    starts: Any = (offsets + shift).tolist()
    view = memoryview(data)
    return [view[a : a + n] for a, n in zip(starts, lengths.tolist())]
