"""Global shuffle and exact duplicate removal on disk: documents go to buckets by hash, buckets are sorted one by one.

The order is that of a keyed hash of the text alone, and a bucket holds a range of hashes, so the result depends on
neither the order of arrival nor the number of buckets. Memory is one bucket and the write buffers. Texts that are equal
byte for byte meet in one bucket side by side. Knows no tokens.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.seeds import derive
from dstrain.base.storage import append_scratch, make_directory

_HEAD = struct.Struct("<16sQI")
_BUFFER_BYTES = 64 << 20
TARGET_BUCKET_BYTES = 256 << 20
MAX_BUCKETS = 4096


@dataclass(frozen=True)
class Shuffled:
    """One document in its final place."""

    text: str
    size_bytes: int
    """Length of the text in UTF-8."""
    split_hash: int
    """64-bit hash of the text alone, the same under any seed: decides what is held out."""
    is_duplicate: bool
    """Equal to the document before it."""


def num_buckets(text_bytes: int | None) -> int:
    """Buckets for an estimated amount of text, so that one fits in memory several times."""
    if text_bytes is None:
        return 64
    return max(1, min(MAX_BUCKETS, -(-text_bytes // TARGET_BUCKET_BYTES)))


class Buckets:
    """Scratch files of hashed documents.

    Attributes:
        num_documents, size_bytes: added so far.
        least_split, greatest_split: bounds of `split_hash` over all documents; None before the first.
    """

    def __init__(self, folder: Path, *, seed: int, count: int):
        self._folder = folder
        self._key = derive(seed, "documents").to_bytes(8, "little")
        self._buffers = [bytearray() for _ in range(count)]
        self._buffered = 0
        self.num_documents = 0
        self.size_bytes = 0
        self.least_split: int | None = None
        self.greatest_split: int | None = None
        make_directory(folder)

    def add(self, text: str) -> None:
        """Put one document into its bucket."""
        data = text.encode("utf-8")
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

    def drain(self) -> Iterator[Shuffled]:
        """Yield every document in global order, duplicates marked, and delete the scratch files."""
        self._flush()
        for bucket in range(len(self._buffers)):
            path = self._path(bucket)
            if path.exists():
                yield from _sorted_bucket(path.read_bytes())
                path.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> None:
        for bucket, buffer in enumerate(self._buffers):
            if buffer:
                append_scratch(self._path(bucket), buffer)
                self._buffers[bucket] = bytearray()
        self._buffered = 0

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:04d}"


def _sorted_bucket(data: bytes) -> Iterator[Shuffled]:
    places: list[tuple[bytes, int, int, int]] = []
    at = 0
    while at < len(data):
        place, split, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        places.append((place, at, length, split))
        at += length
    # Equal places are equal texts (a 128-bit hash), so where they came from cannot matter.
    places.sort()
    previous: bytes | None = None
    for place, start, length, split in places:
        yield Shuffled(data[start : start + length].decode("utf-8"), length, split, is_duplicate=place == previous)
        previous = place
