import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.data.packing import PACKER_VERSION, pack

GOLDEN = Path(__file__).parents[2] / "golden" / "packing.json"


@st.composite
def cases(draw):
    frame = draw(st.integers(0, 3))
    return draw(st.lists(st.integers(1, 150), max_size=60)), draw(st.integers(frame + 1, 64)), frame


def packed(lengths, sequence_length, frame):
    ends = np.cumsum(np.array(lengths, dtype=np.int64)).astype(np.uint32)
    return pack(ends, sequence_length=sequence_length, frame_length=frame)


def rows_of(packing):
    """The rows as lists of (document, start, length)."""
    pieces = list(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist()))
    starts = packing.row_starts.tolist()
    return [pieces[a:b] for a, b in pairwise(starts)]


@given(cases())
def test_every_token_is_in_exactly_one_piece(case):
    lengths, _, _ = case
    seen = np.zeros(sum(lengths), dtype=int)
    begins = np.cumsum([0, *lengths])
    packing = packed(*case)
    for document, start, length in (piece for row in rows_of(packing) for piece in row):
        assert start + length <= lengths[document]
        seen[begins[document] + start : begins[document] + start + length] += 1
    assert (seen == 1).all()
    assert packing.row_starts[-1] == len(packing.document)


@given(cases())
def test_a_document_that_fits_is_never_cut_and_a_longer_one_as_little_as_possible(case):
    lengths, sequence_length, frame = case
    capacity = sequence_length - frame
    pieces = np.bincount(packed(*case).document, minlength=len(lengths))
    assert pieces.tolist() == [-(-length // capacity) for length in lengths]


@given(cases())
def test_rows_are_never_empty_and_never_overflow(case):
    _, sequence_length, frame = case
    for row in rows_of(packed(*case)):
        assert 0 < sum(length + frame for _, _, length in row) <= sequence_length


@given(cases())
def test_rows_are_those_of_a_plain_best_fit_decreasing_search(case):
    lengths, sequence_length, frame = case
    capacity = sequence_length - frame
    pieces = [
        (document, start, min(capacity, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]
    rows, free = [], []
    for piece in sorted(pieces, key=lambda p: (-p[2], p[0], p[1])):
        need = piece[2] + frame
        fitting = [r for r in range(len(rows)) if free[r] >= need]
        row = min(fitting, key=lambda r: (free[r], r), default=None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(sequence_length)
        rows[row].append(piece)
        free[row] -= need
    assert rows_of(packed(*case)) == rows


def test_a_block_without_documents_has_no_rows():
    assert packed([], 16, 2).num_rows == 0


@pytest.mark.parametrize(("sequence_length", "frame"), [(2, 2), (1, 3)])
def test_a_row_without_room_beside_the_frame_is_refused(sequence_length, frame):
    with pytest.raises(ConfigError, match=rf"data\.sequence_length: {sequence_length} leaves no room beside {frame}"):
        packed([5], sequence_length, frame)


@pytest.mark.parametrize("sequence_length", [256, 512, 1024, 2048])
def test_padding_of_blocks_of_ordinary_documents_stays_below_the_promise(sequence_length):
    # Lengths like those of web text (median 402), in blocks of about 256 Ki tokens.
    lengths = np.maximum(1, np.random.default_rng(1).lognormal(np.log(402), 1.05, 380).astype(int)).tolist()
    packing = packed(lengths, sequence_length, 2)
    used = sum(lengths) + 2 * len(packing.document)
    assert 1 - used / (packing.num_rows * sequence_length) <= 0.012


def test_known_rows_never_change():
    # A change here needs a new PACKER_VERSION.
    packing = packed([5, 3, 20, 1, 4], 10, 2)
    assert rows_of(packing) == [
        [(2, 0, 8)],
        [(2, 8, 8)],
        [(0, 0, 5), (3, 0, 1)],
        [(2, 16, 4)],
        [(4, 0, 4)],
        [(1, 0, 3)],
    ]


def test_known_packings_never_change():
    # The same on every platform and library version. DSTRAIN_UPDATE_GOLDEN=1 writes them anew, with a new PACKER_VERSION.
    found = {}
    for sequence_length in (64, 128, 512, 1024, 8192):
        for frame in (0, 2, 3):
            packing = packed((np.arange(1, 1500) * 2654435761 % 1999) + 1, sequence_length, frame)
            fields = (packing.document, packing.start, packing.length, packing.row_starts)
            digest = hashlib.sha256(b"".join(field.astype("<i8").tobytes() for field in fields)).hexdigest()
            found[f"S{sequence_length} frame {frame}"] = f"{packing.num_rows} rows, {digest}"
    if os.environ.get("DSTRAIN_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps({"packer_version": PACKER_VERSION, **found}, indent=1) + "\n", encoding="utf-8")
    assert {"packer_version": PACKER_VERSION, **found} == json.loads(GOLDEN.read_text(encoding="utf-8"))
