"""Index one tar: walk its headers, learn each document's length in tokens, cut blocks, take checksums.

A pure function of the tar's bytes, its name, the tokenizer and the settings, so shards can be done in any order, by any
number of processes, and again after a kill. Reads the tar once or twice, writes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dstrain.base.checksums import crc32
from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.manifest import BLOCK, MAX_BLOCK_BYTES, SAMPLE
from dstrain.foreign.payloads import MemberChoice, NpyLayout, read_npy_layout, read_text
from dstrain.foreign.ranges import (
    GAP_BYTES,
    UNIT,
    Int64,
    begin_of,
    find_ranges,
    padded_ends,
    read_range,
    slice_members,
)
from dstrain.foreign.samples import Samples, group_samples
from dstrain.foreign.tar_walk import Members, TarLimits, walk_tar

SPLITS = ("train", "validation")
BLOCK_BYTES = 64 << 20
"""Bytes at which a block is cut even if it has few tokens: bounds the memory of a read."""
assert BLOCK_BYTES < MAX_BLOCK_BYTES
_BATCH_BYTES = 1 << 20
_BATCH_SAMPLES = 1024
OnBytes = Callable[[int], None]


class ShardIndexConfig(Config):
    """What decides the index of a shard, beside its bytes and the tokenizer."""

    member: MemberChoice
    """Where the documents are."""
    block_tokens: int = Field(default=131072, ge=64, le=1 << 24)
    """Tokens at which a block is cut: 128Ki pads rows of up to 2048 by about 1 %."""
    held_out_below: int = Field(default=0, ge=0, le=1 << 64)
    """Samples whose hash is below this are held out."""
    skip_missing: bool = False
    """Leave out samples without the member instead of refusing them."""
    limits: TarLimits = TarLimits()
    """Bounds on the tar itself."""


@dataclass
class ShardIndex:
    """What one shard gave; block records count samples from the shard's first."""

    bytes: int
    sha256: str
    samples: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Split to (n,) records of `manifest.SAMPLE`."""
    blocks: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Split to (b,) records of `manifest.BLOCK`, shard 0."""
    num_samples: int = 0
    num_empty: int = 0
    """Left out because they have no token."""
    num_missing: int = 0
    """Left out because they lack the member."""
    least_hash: int = 1 << 64
    """Least split hash of a sample that is used."""


def split_hash(shard_name: str, key: str) -> int:
    """64-bit hash that decides whether a sample is held out: of the shard's file name and the sample's key."""
    text = f"{shard_name}\0{key}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"dstrain-split").digest(), "little")


def index_shard(
    path: Path,
    tokenizer: Tokenizer,
    config: ShardIndexConfig,
    *,
    check: Callable[[Members, Samples], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> ShardIndex:
    """Index one tar.

    Args:
        path: the tar.
        tokenizer: what text is tokenised with, and what npy ids must belong to.
        config: settings.
        check: called with what the walk found, e.g. to hold another program's index against it.
        on_bytes: called with bytes of the tar done since the last call.

    Raises:
        DataError: the tar is refused, or a document cannot be read; names shard and sample.
    """
    members = walk_tar(path, config.limits)
    samples = group_samples(members, source=str(path))
    if check is not None:
        check(members, samples)
    report = on_bytes or (lambda _count: None)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _ShardIndexer(path, handle, members, samples, tokenizer, config, report).run()
    except OSError as error:
        raise DataError(f"{path}: reading failed: {error}") from error
    finally:
        os.close(handle)


class _ShardIndexer:
    def __init__(
        self,
        path: Path,
        handle: int,
        members: Members,
        samples: Samples,
        tokenizer: Tokenizer,
        config: ShardIndexConfig,
        report: OnBytes,
    ) -> None:
        self._path, self._handle, self._members, self._samples = path, handle, members, samples
        self._tokenizer, self._config, self._report = tokenizer, config, report
        self._reported = 0

    def run(self) -> ShardIndex:
        result = ShardIndex(bytes=self._members.size_bytes, sha256="", num_samples=len(self._samples.keys))
        used, table = self._table(result)
        kept = table["tokens"] > 0
        result.num_empty = len(table) - int(kept.sum())
        keys = [self._samples.keys[number] for number in used[kept].tolist()]
        hashes = np.array([split_hash(self._path.name, key) for key in keys], dtype=np.uint64)
        result.least_hash = int(hashes.min()) if len(hashes) else 1 << 64
        below = self._config.held_out_below
        held_out = np.ones(len(hashes), dtype=bool) if below > (2**64 - 1) else hashes < np.uint64(below)
        for split, chosen in zip(SPLITS, (~held_out, held_out)):
            result.samples[split] = table[kept][chosen]
            result.blocks[split] = self._blocks(result.samples[split])
        result.sha256 = self._digest()
        return result

    def _table(self, result: ShardIndex) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Numbers of the samples with the member, and their records, those without tokens included."""
        wanted = self._config.member.extension
        used, offsets, sizes = [], [], []
        for number, part in enumerate(self._samples.parts):
            member = part.get(wanted)
            if member is None:
                self._missing(number, part)
                result.num_missing += 1
                continue
            if self._members.sizes[member] > BLOCK_BYTES:
                raise self._bad(number, f"a document of {self._members.sizes[member]} bytes, more than {BLOCK_BYTES}")
            used.append(number)
            offsets.append(self._members.offsets[member])
            sizes.append(self._members.sizes[member])
        table = np.zeros(len(used), dtype=SAMPLE)
        table["off"], table["len"] = np.array(offsets, dtype=np.uint64), np.array(sizes, dtype=np.uint32)
        for first, last in _batches(np.array(sizes, dtype=np.int64)):
            self._measure(table[first:last], used[first:last])
            self._progress(int(table["off"][last - 1]) + int(table["len"][last - 1]))
        return np.array(used, dtype=np.int64), table

    def _missing(self, number: int, part: dict[str, int]) -> None:
        if not self._config.skip_missing:
            has = ", ".join(f".{name}" for name in sorted(part))
            raise DataError(
                f"{self._path}: sample {self._samples.keys[number]!r} has no .{self._config.member.extension} member "
                f"(it has {has}). Leave such samples out with --skip-missing, or choose another with --text-field"
            )

    def _measure(self, table: npt.NDArray[Any], numbers: list[int]) -> None:
        offsets, lengths = table["off"].astype(np.int64), table["len"].astype(np.int64)
        ranges = find_ranges(offsets, lengths, begin=int(offsets[0]) - UNIT)
        payloads = slice_members(self._read(ranges), ranges, offsets, lengths)
        if self._config.member.form == "npy":
            layouts = [self._npy(payload, number) for payload, number in zip(payloads, numbers)]
            table["tokens"] = [layout.count for layout in layouts]
            table["lead"] = [layout.lead for layout in layouts]
            table["width"] = [layout.width for layout in layouts]
            return
        texts = [self._text(payload, number) for payload, number in zip(payloads, numbers)]
        table["tokens"] = [len(ids) for ids in self._tokenizer.encode_documents(texts)]

    def _npy(self, payload: memoryview, number: int) -> NpyLayout:
        try:
            layout = read_npy_layout(payload)
        except ValueError as error:
            raise self._bad(number, str(error)) from None
        if layout.count:
            # Negative ids become huge ones, which no vocabulary has.
            greatest = int(np.frombuffer(payload[layout.lead :], dtype=f"<u{layout.width}").max())
            if greatest >= self._tokenizer.vocab_size:
                raise self._bad(
                    number,
                    f"id {greatest} does not belong to the tokenizer's vocabulary of {self._tokenizer.vocab_size}",
                )
        return layout

    def _text(self, payload: memoryview, number: int) -> str:
        try:
            return read_text(payload, self._config.member)
        except ValueError as error:
            raise self._bad(number, str(error)) from None

    def _blocks(self, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
        offsets, lengths = table["off"].astype(np.int64), table["len"].astype(np.int64)
        records, previous_end = [], 0
        for first, last in _cuts(table["tokens"].astype(np.int64), offsets, lengths, self._config.block_tokens):
            begin = begin_of(int(offsets[first]), previous_end=previous_end)
            ranges = find_ranges(offsets[first:last], lengths[first:last], begin=begin)
            previous_end = int(ranges[-1, 1])
            tokens = int(table["tokens"][first:last].sum(dtype=np.int64))
            records.append((0, last - first, tokens, crc32(self._read(ranges)), begin, first))
        return np.array(records, dtype=BLOCK)

    def _read(self, ranges: Int64) -> bytes:
        data = b"".join([read_range(self._handle, start, stop) for start, stop in ranges.tolist()])
        if len(data) != int((ranges[:, 1] - ranges[:, 0]).sum()):
            raise DataError(f"{self._path}: shrank while it was indexed; index it again when it is complete")
        return data

    def _digest(self) -> str:
        digest, at = hashlib.sha256(), 0
        while data := os.pread(self._handle, 8 << 20, at):
            digest.update(data)
            at += len(data)
        if at != self._members.size_bytes:
            raise DataError(f"{self._path}: changed while it was indexed; index it again when it is complete")
        self._progress(at)
        return digest.hexdigest()

    def _progress(self, at: int) -> None:
        self._report(at - self._reported)
        self._reported = at

    def _bad(self, number: int, reason: str) -> DataError:
        member = f"{self._samples.keys[number]}.{self._config.member.extension}"
        return DataError(f"{self._path}: member {member!r}: {reason}")


def _batches(sizes: Int64) -> Iterator[tuple[int, int]]:
    """Runs of members that are read and tokenised together."""
    first = 0
    ends = np.cumsum(sizes)
    while first < len(sizes):
        done = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, done + _BATCH_BYTES, side="right"))
        last = min(max(last, first + 1), first + _BATCH_SAMPLES)
        yield first, last
        first = last


def _cuts(tokens: Int64, offsets: Int64, lengths: Int64, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Runs of samples that make a block: as many as fit, at least one."""
    ends = np.cumsum(tokens)
    starts = offsets - UNIT
    stops = padded_ends(offsets, lengths)
    gaps = starts[1:] - stops[:-1]
    size = stops - starts
    size[1:] += np.where(gaps <= GAP_BYTES, gaps, 0)
    read = np.cumsum(size)
    first = 0
    while first < len(tokens):
        done, done_bytes = (int(ends[first - 1]), int(read[first - 1])) if first else (0, 0)
        last = int(np.searchsorted(ends, done + block_tokens, side="right"))
        last = min(last, int(np.searchsorted(read, done_bytes + BLOCK_BYTES, side="right")))
        last = max(last, first + 1)
        yield first, last
        first = last
