"""Packed rows of datasets, cut out of decoded blocks that a small cache keeps.

A row is found by (block, row) alone: packing is a pure function of a block's document ends. A block is laid out row by row
when it is read, frames included, so that a row is one slice ever after. Knows no order and no masks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.protocols import Pieces
from dstrain.data.blocks import Block, BlockDataset
from dstrain.data.packing import Packing, pack

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

PlannedRow = tuple[int, int, int, int]
"""(source, epoch, block, row)."""


@dataclass(frozen=True)
class PackedBlock:
    """A block as its rows, one after another."""

    tokens: npt.NDArray[Any]
    """(T,) framed pieces in the order of the rows."""
    row_tokens: list[int]
    """R+1 offsets of the rows in `tokens`."""
    row_pieces: list[int]
    """R+1 offsets of the rows in `pieces`."""
    pieces: Int64
    """(P, 4) of each piece: tokens with its frame, document, start in the document, number of its first word."""
    word_begins: Bool | None
    """(T,) see `Pieces.word_begins`."""

    @property
    def size_bytes(self) -> int:
        """Memory it takes."""
        words = 0 if self.word_begins is None else self.word_begins.nbytes
        return self.tokens.nbytes + self.pieces.nbytes + words + 16 * len(self.row_tokens)


class RowSource:
    """Rows of one dataset, packed to one sequence length, read through a small cache of decoded blocks."""

    def __init__(
        self,
        dataset: BlockDataset,
        *,
        sequence_length: int,
        word_starts: Bool | None,
        cache_bytes: int,
        salt: int = 0,
    ) -> None:
        """Wrap a dataset.

        Args:
            dataset: opened shards.
            sequence_length: tokens of a row.
            word_starts: (vocab,) True where a token begins a word, or None when the objective does not ask for words.
            cache_bytes: decoded blocks kept.
            salt: 64 bits that tell this source's documents from those of the run's other sources.
        """
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.prefix = np.asarray(dataset.manifest.frame_prefix, dtype=np.int64)
        self.suffix = np.asarray(dataset.manifest.frame_suffix, dtype=np.int64)
        self._word_starts = word_starts
        self._salt = np.uint64(salt).astype(np.int64)
        self._cache: OrderedDict[int, PackedBlock] = OrderedDict()
        self.cache_bytes = cache_bytes
        self._cache_used = 0
        self._lock = threading.Lock()

    @property
    def frame_length(self) -> int:
        """Special tokens added to each piece."""
        return len(self.prefix) + len(self.suffix)

    def pieces(self, rows: Sequence[tuple[int, int, int]]) -> tuple[Pieces, tuple[int, ...]]:
        """Cut out the pieces of some rows, longest piece first.

        Args:
            rows: (epoch, block, row) triples.

        Returns:
            The tokens and the segment lengths, frames included, descending.
        """
        return gather([self], [(0, *row) for row in rows])

    def row_tokens(self, rows: Iterable[tuple[int, int]]) -> list[npt.NDArray[Any]]:
        """Framed tokens of some (block, row) pairs, each a view into its block."""
        known: dict[int, PackedBlock] = {}
        found = []
        for number, row in rows:
            block = known.get(number)
            if block is None:
                block = known[number] = self.block(number)
            found.append(block.tokens[block.row_tokens[row] : block.row_tokens[row + 1]])
        return found

    def block(self, number: int) -> PackedBlock:
        """A block, from the cache or read, packed and laid out now."""
        with self._lock:
            block = self._cache.get(number)
            if block is not None:
                self._cache.move_to_end(number)
                return block
        block = self._read(number)
        with self._lock:
            if number not in self._cache:
                self._cache[number] = block
                self._cache_used += block.size_bytes
                while self._cache_used > self.cache_bytes and len(self._cache) > 1:
                    self._cache_used -= self._cache.popitem(last=False)[1].size_bytes
        return block

    def _read(self, number: int) -> PackedBlock:
        raw = self.dataset.read(number)
        packing = pack(raw.ends, sequence_length=self.sequence_length, frame_length=self.frame_length)
        ends = raw.ends.astype(np.int64)
        begins = np.concatenate([[0], ends[:-1]])
        lengths = packing.length + self.frame_length
        uid = ((number << 24) + packing.document) ^ self._salt
        words, first_words = None, np.zeros_like(lengths)
        if self._word_starts is not None:
            words, ordinal = word_numbers(raw.tokens, begins, self._word_starts)
            first_words = ordinal[begins[packing.document] + packing.start]
        piece_ends = np.concatenate([[0], np.cumsum(lengths)])
        tokens, word_begins = self._lay_out(raw, packing, begins, piece_ends, words)
        return PackedBlock(
            tokens=tokens,
            row_tokens=piece_ends[packing.row_starts].tolist(),
            row_pieces=packing.row_starts.tolist(),
            pieces=np.stack([lengths, uid, packing.start, first_words], axis=1),
            word_begins=word_begins,
        )

    def _lay_out(
        self, raw: Block, packing: Packing, begins: Int64, piece_ends: Int64, words: Bool | None
    ) -> tuple[npt.NDArray[Any], Bool | None]:
        """The framed pieces in the order of the rows, and where words begin in them."""
        first = begins[packing.document] + packing.start
        dtype = raw.tokens.dtype
        tokens = _framed(raw.tokens, first, packing.length, self.prefix.astype(dtype), self.suffix.astype(dtype))
        if words is None:
            return tokens, None
        frame = np.zeros(self.frame_length, dtype=np.bool_)
        head = len(self.prefix)
        word_begins = _framed(words, first, packing.length, frame[:head], frame[head:])
        word_begins[piece_ends[:-1] + head] = True  # also where a piece begins inside a word
        return tokens, word_begins


def _framed(
    values: npt.NDArray[Any], first: Int64, length: Int64, prefix: npt.NDArray[Any], suffix: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """The pieces of `values`, each between prefix and suffix, one after another."""
    if len(values) > _LONG_PIECE * len(first):  # few long pieces: copying each costs less than an index of every token
        joint, parts = np.concatenate([suffix, prefix]), [prefix]
        for begin, end in zip(first.tolist(), (first + length).tolist()):
            parts += (values[begin:end], joint)
        parts[-1] = suffix
        return np.concatenate(parts)
    framed = length + (len(prefix) + len(suffix))
    end = np.cumsum(framed)
    begin = end - framed
    source = np.arange(int(end[-1])) + np.repeat(first - begin - len(prefix), framed)  # wrong on frames, set below
    found: npt.NDArray[Any] = values.take(source, mode="clip")
    for at, value in enumerate(prefix.tolist()):
        found[begin + at] = value
    for at, value in enumerate(suffix.tolist()):
        found[end - len(suffix) + at] = value
    return found


_LONG_PIECE = 200


def gather(sources: Sequence[RowSource], rows: Sequence[PlannedRow]) -> tuple[Pieces, tuple[int, ...]]:
    """The pieces of rows of one or several sources, and their lengths, longest first; see `gather_groups`."""
    pieces, _ = gather_groups(sources, [rows])
    return pieces, tuple(pieces.lengths.tolist())


def gather_groups(sources: Sequence[RowSource], groups: Sequence[Sequence[PlannedRow]]) -> tuple[Pieces, list[int]]:
    """Cut out the pieces of groups of rows, each group's longest piece first; equal lengths keep the order of the rows.

    Args:
        sources: of one tokenizer, hence with one frame; all with words or all without.
        groups: (source, epoch, block, row) of each group; at least one row in all.

    Returns:
        The pieces, group after group, and how many each group has.

    Raises:
        DamagedBlockError: a block's bytes are not those that were written.
    """
    tokens, tables, begins = [], [], []
    counts: list[int] = []
    sizes: list[int] = []
    known: dict[tuple[int, int], PackedBlock] = {}  # asking the sources' caches takes a lock each time
    for group in groups:
        before = len(counts)
        for source, _, number, row in group:
            block = known.get((source, number))
            if block is None:
                block = known[source, number] = sources[source].block(number)
            begin, end = block.row_tokens[row], block.row_tokens[row + 1]
            first, last = block.row_pieces[row], block.row_pieces[row + 1]
            tokens.append(block.tokens[begin:end])
            tables.append(block.pieces[first:last])
            counts.append(last - first)
            if block.word_begins is not None:
                begins.append(block.word_begins[begin:end])
        sizes.append(sum(counts[before:]))
    table = np.concatenate(tables)
    epochs = np.repeat(np.array([row[1] for group in groups for row in group], dtype=np.int64), counts)
    order = np.argsort((np.repeat(np.arange(len(groups)), sizes) << 32) - table[:, 0], kind="stable")
    was_at = (np.cumsum(table[:, 0]) - table[:, 0])[order]
    lengths, documents, starts, first_words = np.ascontiguousarray(table[order].T)
    offsets = segment_positions(lengths)
    index = np.repeat(was_at, lengths)
    index += offsets
    pieces = Pieces(
        tokens=np.concatenate(tokens).take(index),
        offsets=offsets,
        lengths=lengths,
        documents=documents,
        starts=starts,
        epochs=epochs[order],
        head=len(sources[0].prefix),
        tail=len(sources[0].suffix),
        word_begins=np.concatenate(begins).take(index) if begins else None,
        first_words=first_words if begins else None,
    )
    return pieces, sizes


def segment_positions(lengths: npt.ArrayLike) -> Int64:
    """(T,) 0, 1, 2, ... restarting at each of the segments of (N,) lengths."""
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    positions = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
    positions -= np.repeat(ends - sizes, sizes)
    return positions


def word_numbers(tokens: npt.NDArray[Any], begins: Int64, word_starts: Bool) -> tuple[Bool, Int64]:
    """Words of a block's documents.

    Args:
        tokens: (T,) ids of a block.
        begins: (D,) first token of each document.
        word_starts: (vocab,) True where a token begins a word; a document's first token does too.

    Returns:
        (T,) whether each token begins a word, and (T,) the number of its word in its document, from 0.
    """
    starts = word_starts[tokens]
    starts[begins] = True
    number = np.cumsum(starts) - 1
    number -= np.repeat(number[begins], np.diff(begins, append=len(tokens)))
    return starts, number
