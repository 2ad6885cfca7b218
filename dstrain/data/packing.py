"""Whole documents into rows of S tokens: best-fit decreasing inside one block, a pure function of the block.

Every piece is framed (`[CLS]` piece `[SEP]`), so S can change without tokenising again. A document that fits a row with
its frame is never cut; a longer one is split into full rows and one tail, never truncated. Attention between pieces is
prevented elsewhere (block-diagonal), here they only share a row. Does not read files and knows no token values.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError

PACKER_VERSION = 1
"""Part of every loader state and row index: a change of the result below must raise it."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The rows of one block. Piece arrays are ordered by row; `row_starts[r]:row_starts[r+1]` are the pieces of row r."""

    document: Int64
    """(P,) index of the document in the block."""
    start: Int64
    """(P,) first token of the piece inside its document."""
    length: Int64
    """(P,) content tokens, frame not counted."""
    row_starts: Int64
    """(R+1,) offsets into the piece arrays."""

    @property
    def num_rows(self) -> int:
        """Rows of the block."""
        return len(self.row_starts) - 1


def pack(ends: npt.NDArray[np.integer], *, sequence_length: int, frame_length: int) -> Packing:
    """Pack the documents of one block.

    Args:
        ends: (D,) cumulative document ends in tokens, as stored in `KEY.ends.npy`.
        sequence_length: tokens of a row, frames included.
        frame_length: special tokens added to each piece.

    Raises:
        ConfigError: a row leaves no room beside the frame.
    """
    capacity = sequence_length - frame_length
    if capacity < 1:
        raise ConfigError(
            f"data.sequence_length: {sequence_length} leaves no room beside {frame_length} special tokens"
        )
    document, start, length = _cut(np.asarray(ends, dtype=np.int64), capacity)
    order = np.lexsort((start, document, -length))
    rows = _best_fit(length[order].tolist(), sequence_length, frame_length)
    by_row = np.argsort(rows, kind="stable")
    order = order[by_row]
    counts = np.bincount(rows) if len(rows) else np.zeros(0, dtype=np.int64)
    row_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Packing(document=document[order], start=start[order], length=length[order], row_starts=row_starts)


def _cut(ends: Int64, capacity: int) -> tuple[Int64, Int64, Int64]:
    """Split documents into pieces of at most `capacity` tokens: full pieces, then the tail."""
    lengths = np.diff(ends, prepend=0)
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    number = np.arange(int(counts.sum())) - first[document]
    start = number * capacity
    length = np.minimum(capacity, lengths[document] - start)
    return document, start, length


def _best_fit(lengths: list[int], sequence_length: int, frame_length: int) -> Int64:
    """Row of each piece, lengths descending: the fullest row that still fits, the older one of two equals."""
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    num_rows = 0
    for piece, length in enumerate(lengths):
        need = length + frame_length
        at = bisect_left(open_rows, (need, -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            free, row = sequence_length, num_rows
            num_rows += 1
        rows[piece] = row
        if free - need > frame_length:  # a row with no room for one framed token is closed
            insort(open_rows, (free - need, row))
    return rows
