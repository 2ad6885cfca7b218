from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.data import rows
from dstrain.data.blocks import Block
from dstrain.data.packing import pack
from dstrain.data.rows import RowSource, gather, segment_positions, word_numbers

VOCAB, PREFIX, SUFFIX = 200, (2,), (3,)


class Memory:
    """A BlockDataset of blocks in memory that counts its reads."""

    name = "memory"

    def __init__(self, blocks, *, prefix=PREFIX, suffix=SUFFIX):
        """blocks: lists of documents, each an array of ids."""
        self.documents = blocks
        self.manifest = SimpleNamespace(frame_prefix=prefix, frame_suffix=suffix)
        self.reads = []

    def read(self, number):
        self.reads.append(number)
        documents = self.documents[number]
        return Block(np.concatenate(documents).astype(np.uint16), self.ends(number))

    def ends(self, number):
        return np.cumsum([len(d) for d in self.documents[number]]).astype(np.uint32)


def dataset_of(seed, *, blocks=3, documents=12, longest=90, **frame):
    rng = np.random.default_rng(seed)
    return Memory(
        [[rng.integers(5, VOCAB, int(n)) for n in rng.integers(1, longest, documents)] for _ in range(blocks)], **frame
    )


def source_of(dataset, *, length=32, words=None, cache_bytes=1 << 20, salt=0):
    return RowSource(dataset, sequence_length=length, word_starts=words, cache_bytes=cache_bytes, salt=salt)


def all_rows(dataset, *, length=32, epoch=0):
    frame = len(dataset.manifest.frame_prefix) + len(dataset.manifest.frame_suffix)
    counts = [
        pack(dataset.ends(b), sequence_length=length, frame_length=frame).num_rows
        for b in range(len(dataset.documents))
    ]
    return [(epoch, block, row) for block, count in enumerate(counts) for row in range(count)]


def plain_segments(dataset, row, *, length, salt=0):
    """What a row holds, as a walk over the packing says: (ids, document, start)."""
    _, block, number = row
    head, tail = list(dataset.manifest.frame_prefix), list(dataset.manifest.frame_suffix)
    packing = pack(dataset.ends(block), sequence_length=length, frame_length=len(head) + len(tail))
    found = []
    for piece in range(*packing.row_starts[number : number + 2].tolist()):
        document, start, size = (int(a[piece]) for a in (packing.document, packing.start, packing.length))
        content = dataset.documents[block][document][start : start + size].tolist()
        found.append((head + content + tail, ((block << 24) + document) ^ salt, start))
    return found


def segments_of(pieces):
    cuts = np.cumsum(pieces.lengths)[:-1]
    ids = [part.tolist() for part in np.split(pieces.tokens, cuts)]
    return list(zip(ids, pieces.documents.tolist(), pieces.starts.tolist()))


@pytest.mark.parametrize(("prefix", "suffix"), [((2,), (3,)), ((), ()), ((2, 4), ()), ((), (3, 3, 3))])
@pytest.mark.parametrize("length", [16, 33, 128])
def test_rows_hold_what_the_packing_says_longest_piece_first(prefix, suffix, length):
    dataset = dataset_of(1, prefix=prefix, suffix=suffix)
    rows = all_rows(dataset, length=length)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    pieces, lengths = source_of(dataset, length=length).pieces(rows)
    expected = [segment for row in rows for segment in plain_segments(dataset, row, length=length)]
    assert segments_of(pieces) == sorted(expected, key=lambda s: -len(s[0]))
    assert lengths == tuple(pieces.lengths.tolist()) == tuple(sorted(map(len, (s[0] for s in expected)), reverse=True))
    assert (pieces.head, pieces.tail) == (len(prefix), len(suffix))


def test_every_token_has_its_place_and_every_frame_token_is_marked():
    dataset = dataset_of(2)
    pieces, lengths = source_of(dataset).pieces(all_rows(dataset, epoch=5))
    assert (pieces.epoch == 5).all()
    assert pieces.frame.sum() == 2 * len(lengths)
    np.testing.assert_array_equal(pieces.frame, np.isin(pieces.tokens, [2, 3]))
    np.testing.assert_array_equal(pieces.offsets, segment_positions(lengths))
    inner = np.flatnonzero(~pieces.frame)
    places = list(zip(pieces.uid[inner].tolist(), pieces.position[inner].tolist()))
    assert len(set(places)) == sum(len(d) for block in dataset.documents for d in block)
    for at, (uid, position) in zip(inner.tolist(), places):
        assert pieces.tokens[at] == dataset.documents[uid >> 24][uid & 0xFFFFFF][position]


def test_rows_of_several_sources_mix_in_one_gather_and_salts_tell_their_documents_apart():
    one, two = dataset_of(3), dataset_of(4)
    salts = (0, 0xF00D_0000_0000_0001)
    sources = [source_of(one), source_of(two, salt=salts[1])]
    rows = [(0, *row) for row in all_rows(one, epoch=1)] + [(1, *row) for row in all_rows(two, epoch=7)]
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    pieces, _ = gather(sources, rows)
    expected = []
    for source, *row in rows:
        salt = int(np.uint64(salts[source]).astype(np.int64))
        expected += [(*s, row[0]) for s in plain_segments((one, two)[source], tuple(row), length=32, salt=salt)]
    expected.sort(key=lambda s: -len(s[0]))
    assert [(*s, e) for s, e in zip(segments_of(pieces), pieces.epochs.tolist())] == expected
    assert (pieces.documents < 0).any()  # a 64-bit pattern, not a number
    assert len(set(pieces.documents.tolist())) == 24 * 3


def test_words_are_numbered_in_their_document_also_where_a_piece_begins_inside_one():
    dataset = dataset_of(5)
    words = np.arange(VOCAB) % 3 == 0
    pieces, _ = source_of(dataset, words=words).pieces(all_rows(dataset))
    number = np.repeat(pieces.first_words, pieces.lengths)
    inside = 0
    at = 0
    for length, uid, start in zip(pieces.lengths, pieces.documents, pieces.starts):
        document = dataset.documents[uid >> 24][uid & 0xFFFFFF]
        walk = [0]
        for token in document[1:]:
            walk.append(walk[-1] + int(words[token]))
        begins = pieces.word_begins[at : at + length]
        assert begins[[0, 1, -1]].tolist() == [False, True, False]
        got = number[at] + np.cumsum(begins[1:-1]) - 1
        assert got.tolist() == walk[start : start + length - 2]
        inside += bool(start and walk[start] == walk[start - 1])
        at += length
    assert inside > 3  # pieces that begin inside a word do occur
    plain = source_of(dataset).pieces([(0, 0, 0)])[0]
    assert (plain.word_begins, plain.first_words) == (None, None)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=6), st.sets(st.integers(0, 9))
)
def test_word_numbers_are_those_of_a_plain_walk(documents, starters):
    table = np.array([token in starters for token in range(10)])
    flags, numbers = [], []
    for document in documents:
        for position, token in enumerate(document):
            flags.append(position == 0 or token in starters)
            numbers.append(0 if position == 0 else numbers[-1] + flags[-1])
    begins = np.cumsum([0, *(len(document) for document in documents[:-1])])
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    before = table.copy()
    found = word_numbers(tokens, begins, table)
    assert (found[0].tolist(), found[1].tolist()) == (flags, numbers)
    np.testing.assert_array_equal(table, before)


def test_a_block_is_read_once_while_it_fits_the_cache_and_the_one_unused_longest_goes_first():
    dataset = dataset_of(6)
    source = source_of(dataset)
    for block in (0, 1, 0, 2, 1, 0):
        source.pieces([(0, block, 0)])
    assert dataset.reads == [0, 1, 2]
    dataset.reads.clear()
    sizes = [source.block(b).size_bytes for b in range(3)]
    small = source_of(dataset, cache_bytes=max(sizes[0] + sizes[1], sizes[0] + sizes[2]))
    for block in (0, 1, 0, 2, 0, 1):  # 2 pushes out 1, not 0
        small.pieces([(0, block, 0)])
    assert dataset.reads == [0, 1, 2, 1]


def test_a_cache_too_small_for_one_block_still_delivers():
    dataset = dataset_of(7)
    tight, roomy = source_of(dataset, cache_bytes=1), source_of(dataset)
    for row in all_rows(dataset):
        assert segments_of(tight.pieces([row])[0]) == segments_of(roomy.pieces([row])[0])


def test_what_is_delivered_is_a_copy():
    dataset = dataset_of(8)
    source = source_of(dataset)
    first = source.pieces([(0, 0, 0)])[0]
    kept = first.tokens.copy()
    first.tokens[:] = 0
    np.testing.assert_array_equal(source.pieces([(0, 0, 0)])[0].tokens, kept)


def test_a_row_too_short_for_the_frame_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 2"):
        source_of(dataset_of(9), length=2).pieces([(0, 0, 0)])


@given(st.lists(st.integers(1, 9), max_size=8))
def test_positions_restart_at_each_segment(lengths):
    assert segment_positions(lengths).tolist() == [i for length in lengths for i in range(length)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 2), st.integers(0, 2), st.data())
def test_long_and_short_pieces_are_framed_alike(lengths, head, tail, data):
    values = np.arange(1, 1 + sum(lengths), dtype=np.uint16)
    first = np.cumsum(lengths) - lengths
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    prefix, suffix = np.full(head, 7000, dtype=np.uint16), np.full(tail, 7001, dtype=np.uint16)
    found = []
    for limit in (0, 10**9):
        with mock.patch.object(rows, "_LONG_PIECE", limit):
            found.append(rows._framed(values, first[order], np.array(lengths)[order], prefix, suffix))
    expected = [v for i in order for v in (*prefix, *values[first[i] : first[i] + lengths[i]], *suffix)]
    assert found[0].dtype == found[1].dtype == np.uint16
    assert found[0].tolist() == found[1].tolist() == expected
