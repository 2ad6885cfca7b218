from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dstrain.foreign.ranges import GAP_BYTES, UNIT, begin_of, find_ranges, padded_ends, read_range, slice_members


@given(members=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3000)), min_size=1, max_size=30))
def test_stretches_hold_every_member_with_its_header_and_skip_large_gaps(members: list[tuple[int, int]]) -> None:
    offsets, lengths, at = [], [], 0
    for gap, length in members:
        at += gap * UNIT + UNIT
        offsets.append(at)
        lengths.append(length)
        at += -(-length // UNIT) * UNIT
    off, size = np.array(offsets), np.array(lengths)
    data = np.random.default_rng(0).bytes(at)
    ranges = find_ranges(off, size, begin=begin_of(offsets[0], previous_end=0))
    read = b"".join(data[a:b] for a, b in ranges.tolist())
    assert [bytes(s) for s in slice_members(read, ranges, off, size)] == [
        data[a : a + n] for a, n in zip(offsets, lengths)
    ]
    assert (ranges[1:, 0] - ranges[:-1, 1] > GAP_BYTES).all()
    ends = padded_ends(off, size)
    wasted = sum(g for g in (off[1:] - UNIT - ends[:-1]).tolist() if g <= GAP_BYTES)
    spent = int((ranges[:, 1] - ranges[:, 0]).sum() - (ends - off + UNIT).sum())
    assert spent == wasted + offsets[0] - UNIT - int(ranges[0, 0])


def test_a_block_begins_where_the_one_before_it_ends() -> None:
    assert begin_of(2048, previous_end=1024) == 1024
    assert begin_of(1 << 20, previous_end=1024) == (1 << 20) - UNIT


def test_reading_stops_at_the_files_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    handle = os.open(tmp_path / "f", os.O_RDONLY)
    assert read_range(handle, 2, 5) == b"234"
    assert read_range(handle, 8, 15) == b"89"
    os.close(handle)
