"""Global shuffle and exact duplicate removal on disk: map tasks sort texts into buckets by hash, reduce tasks read a bucket.

The order is that of a keyed hash of the text alone, and a bucket holds a range of hashes, so the result depends on
neither the order of arrival nor the number of tasks or buckets. A map task writes one file: runs of records, one run a
bucket and flush, then a table of their offsets. Texts that are equal byte for byte meet in one bucket and are kept
once, with their number. Memory is the write buffer here and the different texts of one bucket there. Knows no tokens.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.base.seeds import derive
from dstrain.base.storage import NewFile

_HEAD = struct.Struct("<16sQI")
_BUFFER_BYTES = 64 << 20
_OFFSETS = struct.Struct("<QQ")
_TARGET_BUCKET_BYTES = 32 << 20
LEAST_BUCKETS, MOST_BUCKETS = 64, 8192
UNKNOWN_TEXT_BYTES = 16 << 30
"""What an input of unknown size (`hf:`) counts as."""


@dataclass(frozen=True)
class Shuffled:
    """One text in its final place."""

    text: str
    size_bytes: int
    """Length of the text in UTF-8."""
    split_hash: int
    """64-bit hash of the text alone, the same under any seed: decides what is held out."""
    copies: int
    """How often the text occurs, itself included."""


@dataclass(frozen=True)
class PartFile:
    """What a map task wrote."""

    path: Path
    size_bytes: int
    """Of the whole file: a shorter one was cut."""
    table: int
    """Where the offsets begin: (flushes, buckets + 1) uint64."""
    flushes: int


def num_buckets(text_bytes: int | None) -> int:
    """A power of two, so that the texts of one bucket fit in memory many times, for an estimated amount of text."""
    wanted = -(-(UNKNOWN_TEXT_BYTES if text_bytes is None else text_bytes) // _TARGET_BUCKET_BYTES)
    return max(LEAST_BUCKETS, min(MOST_BUCKETS, 1 << max(0, wanted - 1).bit_length()))


class BucketWriter:
    """The bucket file of one map task.

    Attributes:
        num_documents, size_bytes: added so far.
        least_split, greatest_split: bounds of `split_hash` over all documents; None before the first.
    """

    def __init__(self, path: Path, *, seed: int, count: int):
        """Create the file.

        Raises:
            StorageError: it cannot be created.
        """
        self._file = NewFile(path)
        self._key = derive(seed, "documents").to_bytes(8, "little")
        self._buffers = [bytearray() for _ in range(count)]
        self._buffered = 0
        self._offsets: list[npt.NDArray[np.uint64]] = []
        self.num_documents = 0
        self.size_bytes = 0
        self.least_split: int | None = None
        self.greatest_split: int | None = None

    def add(self, data: bytes) -> None:
        """Put one document, UTF-8, into its bucket.

        Raises:
            StorageError: the disk is full or failing.
        """
        place = hashlib.blake2b(data, digest_size=16, key=self._key).digest()
        split = int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"dstrain-split").digest(), "little")
        buffer = self._buffers[int.from_bytes(place[:8], "big") * len(self._buffers) >> 64]
        buffer += _HEAD.pack(place, split, len(data))
        buffer += data
        self._buffered += _HEAD.size + len(data)
        self.num_documents += 1
        self.size_bytes += len(data)
        self.least_split = split if self.least_split is None else min(split, self.least_split)
        self.greatest_split = split if self.greatest_split is None else max(split, self.greatest_split)
        if self._buffered > _BUFFER_BYTES:
            self._flush()

    def finish(self) -> PartFile:
        """Write what is left and the table, durably."""
        self._flush()
        table = self._file.size_bytes
        for offsets in self._offsets:
            self._file.write(offsets.tobytes())
        self._file.finish()
        return PartFile(self._file.path, self._file.size_bytes, table, len(self._offsets))

    def abandon(self) -> None:
        """Close and delete the unfinished file."""
        self._file.abandon()
        self._file.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._buffered:
            return
        ends = np.cumsum([0, *map(len, self._buffers)], dtype="<u8") + np.uint64(self._file.size_bytes)
        self._offsets.append(ends)
        for bucket, buffer in enumerate(self._buffers):
            if buffer:
                self._file.write(memoryview(buffer))
                self._buffers[bucket] = bytearray()
        self._buffered = 0


def read_bucket(parts: Sequence[PartFile], bucket: int, *, count: int) -> Iterator[Shuffled]:
    """Yield the different texts of one bucket of `count`, over all parts, in global order.

    Raises:
        DataError: a part is missing or cut.
    """
    found: dict[bytes, tuple[int, bytes]] = {}
    copies: dict[bytes, int] = {}
    for part in parts:
        for data in _runs(part, bucket, count=count):
            at = 0
            while at < len(data):
                place, split, length = _HEAD.unpack_from(data, at)
                at += _HEAD.size
                # Equal places are equal texts (a 128-bit hash), so where a text came from cannot matter.
                if place not in found:
                    found[place] = (split, data[at : at + length])
                copies[place] = copies.get(place, 0) + 1
                at += length
    for place in sorted(found):
        split, text = found.pop(place)
        yield Shuffled(text.decode("utf-8"), len(text), split, copies[place])


def _runs(part: PartFile, bucket: int, *, count: int) -> Iterator[bytes]:
    try:
        handle = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{part.path}: {error.strerror}; {_MEND}") from None
    try:
        if os.fstat(handle).st_size != part.size_bytes:
            raise DataError(f"{part.path}: {os.fstat(handle).st_size} bytes, should be {part.size_bytes}; {_MEND}")
        for flush in range(part.flushes):
            row = part.table + _OFFSETS.size // 2 * (flush * (count + 1) + bucket)
            start, stop = _OFFSETS.unpack(os.pread(handle, _OFFSETS.size, row))
            if stop > start:
                yield _read(handle, start, stop)
    finally:
        os.close(handle)


def _read(handle: int, start: int, stop: int) -> bytes:
    pieces = []
    while start < stop:  # one pread gives at most 2 GiB
        piece = os.pread(handle, stop - start, start)
        if not piece:
            break
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_MEND = "the work folder was touched: delete it and build again"
