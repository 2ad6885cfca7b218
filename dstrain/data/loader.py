"""Rows of the plan as packed, corrupted micro-batches: a pure function of (seed, step, rank, world).

Joins plan, reader, packing and the objective's corruption (passed in as a function: this room knows no masks). State is a
handful of integers and fingerprints. Prefetching is `data.prefetch`; the order never depends on it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import CheckpointError
from dstrain.base.protocols import IGNORED_LABEL, Corrupt, MicroBatch, Pieces, StepData
from dstrain.base.world import World
from dstrain.data.order import ORDER_VERSION, UInt64, mix64
from dstrain.data.packing import PACKER_VERSION, Packing, pack
from dstrain.data.plan import PLAN_VERSION, Plan, num_micro_batches, rank_slots
from dstrain.data.reader import ShardDataset

Int64 = npt.NDArray[np.int64]

LEDGER_MODULUS = 1 << 63


class DataConfig(Config):
    """Where the shards are and how their rows are made and ordered."""

    path: Path
    """Folder made by `dstrain shards build`, with train/, validation/ and tokenizer/ inside."""
    sequence_length: int = Field(default=128, ge=8, le=65536)
    """Tokens of a packed row, special tokens included. Can change without building the shards again."""
    lanes: int | None = Field(default=None, ge=1)
    """Canonical lanes C of the plan; must divide train.global_batch. Default: the largest divisor up to 64."""
    window_rows: int = Field(default=8192, ge=1)
    """Rows of one shuffle window of a lane; 8192 in 64 lanes reaches the quality of a full shuffle (docs/data-format.md)."""
    prefetch_steps: int = Field(default=2, ge=0, le=64)
    """Steps made ahead by a background thread; 0 makes each step when it is asked for. Never changes the order."""
    cache_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """Decoded blocks kept in memory per rank, in bytes."""


@dataclass(frozen=True)
class _CachedBlock:
    tokens: npt.NDArray[np.unsignedinteger]
    begins: Int64
    packing: Packing
    word: Int64 | None


class RowSource:
    """Rows of one dataset, packed to one sequence length, read through a small cache of decoded blocks."""

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        sequence_length: int,
        word_starts: npt.NDArray[np.bool_] | None,
        cache_bytes: int,
    ) -> None:
        """Wrap a dataset.

        Args:
            dataset: opened shards.
            sequence_length: tokens of a row.
            word_starts: (vocab,) True where a token begins a word, or None when the objective does not ask for words.
            cache_bytes: decoded blocks kept.
        """
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.prefix = np.asarray(dataset.manifest.frame_prefix, dtype=np.int64)
        self.suffix = np.asarray(dataset.manifest.frame_suffix, dtype=np.int64)
        self._word_starts = word_starts
        self._cache: OrderedDict[int, _CachedBlock] = OrderedDict()
        self._cache_limit = cache_bytes
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
        found: list[tuple[int, int, _CachedBlock, int, int]] = []
        for epoch, number, row in rows:
            block = self._block(number)
            first, last = block.packing.row_starts[row : row + 2].tolist()
            found += [(int(block.packing.length[p]), epoch, block, number, p) for p in range(first, last)]
        found.sort(key=lambda item: -item[0])  # stable: equal lengths keep slot order
        return self._gather(found), tuple(item[0] + self.frame_length for item in found)

    def _gather(self, found: Sequence[tuple[int, int, _CachedBlock, int, int]]) -> Pieces:
        head, tail = len(self.prefix), len(self.suffix)
        total = sum(item[0] for item in found) + len(found) * self.frame_length
        tokens, uid, position, epochs = (np.zeros(total, dtype=np.int64) for _ in range(4))
        word = np.zeros(total, dtype=np.int64) if self._word_starts is not None else None
        frame = np.ones(total, dtype=np.bool_)
        at = 0
        for length, epoch, block, number, piece in found:
            document, start = int(block.packing.document[piece]), int(block.packing.start[piece])
            begin = int(block.begins[document]) + start
            inner = slice(at + head, at + head + length)
            end = at + head + length + tail
            tokens[at : at + head] = self.prefix
            tokens[inner] = block.tokens[begin : begin + length]
            tokens[inner.stop : end] = self.suffix
            frame[inner] = False
            uid[at:end] = (number << 24) + document
            position[inner] = np.arange(start, start + length)
            epochs[at:end] = epoch
            if word is not None and block.word is not None:
                word[inner] = block.word[begin : begin + length]
            at = end
        return Pieces(tokens=tokens, frame=frame, uid=uid, position=position, word=word, epoch=epochs)

    def _block(self, number: int) -> _CachedBlock:
        with self._lock:
            block = self._cache.get(number)
            if block is not None:
                self._cache.move_to_end(number)
                return block
        block = self._read(number)
        with self._lock:
            if number not in self._cache:
                self._cache[number] = block
                self._cache_used += _size_bytes(block)
                while self._cache_used > self._cache_limit and len(self._cache) > 1:
                    self._cache_used -= _size_bytes(self._cache.popitem(last=False)[1])
        return block

    def _read(self, number: int) -> _CachedBlock:
        raw = self.dataset.read(number)
        ends = raw.ends.astype(np.int64)
        begins = np.concatenate([[0], ends[:-1]])
        packing = pack(raw.ends, sequence_length=self.sequence_length, frame_length=self.frame_length)
        word = None
        if self._word_starts is not None:
            word = word_positions(raw.tokens, begins, self._word_starts)
        return _CachedBlock(tokens=raw.tokens, begins=begins, packing=packing, word=word)


def _size_bytes(block: _CachedBlock) -> int:
    packing = block.packing
    return int(
        block.tokens.nbytes
        + 3 * packing.length.nbytes
        + packing.row_starts.nbytes
        + block.begins.nbytes
        + (block.word.nbytes if block.word is not None else 0)
    )


def word_positions(tokens: npt.NDArray[Any], begins: Int64, word_starts: npt.NDArray[np.bool_]) -> Int64:
    """(T,) position, inside its document, of the first token of each token's word; a document starts a word."""
    starts = word_starts[tokens]
    starts[begins] = True
    first = np.maximum.accumulate(np.where(starts, np.arange(len(tokens)), 0))
    return first - np.repeat(begins, np.diff(begins, append=len(tokens)))


class PackedLoader:
    """Implements `base.protocols.Loader` for packed rows."""

    def __init__(
        self, source: RowSource, plan: Plan, corrupt: Corrupt, *, corruption: str, world: World, micro_batch: int
    ) -> None:
        """Join the parts.

        Args:
            source: rows of the training split.
            plan: their order.
            corrupt: the objective's corruption of a micro-batch.
            corruption: a text that names the corruption and its settings; part of the state.
            world: whose share this is.
            micro_batch: most rows of one forward.
        """
        self._source, self._plan, self._corrupt, self._corruption = source, plan, corrupt, corruption
        self._first, self._last = rank_slots(plan.global_batch, rank=world.rank, world_size=world.size)
        self._num_micro = num_micro_batches(plan.global_batch, micro_batch=micro_batch, world_size=world.size)
        self.steps_per_epoch = plan.rows_per_epoch / plan.global_batch

    def step(self, step: int) -> StepData:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        planned = self._plan.slots(step, self._first, self._last)
        rows = list(zip(planned.epoch.tolist(), planned.block.tolist(), planned.row.tolist()))
        micro_batches, ledger = [], 0
        for part in split_evenly(rows, self._num_micro):
            batch, digest = make_micro_batch(self._source, part, self._corrupt, step=step)
            micro_batches.append(batch)
            ledger = (ledger + digest) % LEDGER_MODULUS
        return StepData(
            micro_batches=micro_batches,
            num_rows=len(rows),
            padded_tokens=len(rows) * self._source.sequence_length,
            ledger=ledger,
            epoch=(step + 1) / self.steps_per_epoch,
        )

    def state_dict(self) -> dict[str, Any]:
        """What pins the order; compared, not restored: the position is the step counter of the run."""
        return {
            "kind": "packed",
            "order_version": ORDER_VERSION,
            "plan_version": PLAN_VERSION,
            "packer_version": PACKER_VERSION,
            "seed": self._plan.seed,
            "source": self._plan.source,
            "fingerprint": self._source.dataset.manifest.fingerprint,
            "sequence_length": self._source.sequence_length,
            "global_batch": self._plan.global_batch,
            "lanes": self._plan.lanes,
            "window_rows": self._plan.window_rows,
            "corruption": self._corruption,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with another dataset or order.

        Raises:
            CheckpointError: with each differing key, its value then and now.
        """
        compare_states(saved=state, now=self.state_dict())


def compare_states(*, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError with a readable diff unless both pin the same data order."""
    differing = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    if differing:
        lines = "; ".join(f"{key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in differing)
        raise CheckpointError(
            f"the data order changed since the checkpoint ({lines}): "
            "restore these settings, or start a new run with model.init_from pointing at this one"
        )


def split_evenly(rows: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Cut a sequence into `parts` runs whose sizes differ by at most one (some may be empty)."""
    bounds = [i * len(rows) // parts for i in range(parts + 1)]
    return [rows[a:b] for a, b in pairwise(bounds)]


def make_micro_batch(
    source: RowSource, rows: Sequence[tuple[int, int, int]], corrupt: Corrupt, *, step: int
) -> tuple[MicroBatch, int]:
    """Pieces of some rows as one micro-batch, and their part of the step's ledger.

    Args:
        source: where rows are read.
        rows: (epoch, block, row) triples; empty makes a filler with zero weight.
        corrupt: the objective's corruption.
        step: enters the ledger, so that a row trained at another step shows.
    """
    if not rows:
        return _filler(source), 0
    pieces, lengths = source.pieces(rows)
    corrupted = corrupt(pieces)
    targets, labels = corrupted.targets, corrupted.labels
    if len(targets) == 0:  # a head that sees no row at all breaks some models; one ignored row costs nothing
        targets, labels = np.zeros(1, dtype=np.int64), np.full(1, IGNORED_LABEL, dtype=np.int64)
    batch = MicroBatch(
        tokens=torch.from_numpy(corrupted.tokens),
        positions=torch.from_numpy(segment_positions(lengths)),
        lengths=lengths,
        targets=torch.from_numpy(targets),
        labels=torch.from_numpy(labels),
        num_targets=len(corrupted.targets),
        num_tokens=len(corrupted.tokens),
    )
    return batch, ledger_digest(pieces, corrupted.tokens, step=step)


def segment_positions(lengths: Sequence[int]) -> Int64:
    """(T,) 0, 1, 2, ... restarting at each segment."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(starts, sizes)


def ledger_digest(pieces: Pieces, inputs: Int64, *, step: int) -> int:
    """Commutative proof of what was trained on: Σ mix(document, position, epoch, step, true id, input id) mod 2^63."""
    with np.errstate(over="ignore"):
        value: UInt64 = pieces.uid.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        value ^= pieces.position.astype(np.uint64) << np.uint64(20)
        value = mix64(value ^ pieces.epoch.astype(np.uint64))
        value = mix64(
            value + (pieces.tokens.astype(np.uint64) << np.uint64(32)) + inputs.astype(np.uint64) + np.uint64(step)
        )
        return int(value.sum(dtype=np.uint64)) % LEDGER_MODULUS


def _filler(source: RowSource) -> MicroBatch:
    tokens = np.concatenate([source.prefix, source.suffix])
    tokens = tokens if len(tokens) else np.zeros(1, dtype=np.int64)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.arange(len(tokens)),
        lengths=(len(tokens),),
        targets=torch.zeros(1, dtype=torch.int64),
        labels=torch.full((1,), IGNORED_LABEL, dtype=torch.int64),
    )


def evaluation_batches(
    source: RowSource,
    rows_per_block: npt.ArrayLike,
    corrupt: Corrupt,
    *,
    world: World,
    micro_batch: int,
    max_rows: int | None,
) -> list[MicroBatch]:
    """This rank's micro-batches of a fixed evaluation set: the same rows and masks at every call and world size.

    Args:
        source: rows of the held-out split.
        rows_per_block: (B,) rows of each block.
        corrupt: the corruption with the evaluation stream's key.
        world: whose share; every rank gets the same number of micro-batches.
        micro_batch: most rows of one forward.
        max_rows: take this many rows, spread evenly over the split; None takes all.
    """
    counts = np.asarray(rows_per_block, dtype=np.int64)
    total = int(counts.sum())
    num_rows = total if max_rows is None else min(total, max_rows)
    chosen = (np.arange(num_rows) * total) // max(1, num_rows)
    ends = np.cumsum(counts)
    block = np.searchsorted(ends, chosen, side="right")
    row = chosen - (ends[block] - counts[block])
    first, last = rank_slots(num_rows, rank=world.rank, world_size=world.size)
    rows = [(0, b, r) for b, r in zip(block[first:last].tolist(), row[first:last].tolist())]
    parts = split_evenly(rows, num_micro_batches(max(1, num_rows), micro_batch=micro_batch, world_size=world.size))
    return [make_micro_batch(source, part, corrupt, step=0)[0] for part in parts]
