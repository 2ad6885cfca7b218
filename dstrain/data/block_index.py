"""`blocks.idx`: where every block lies, as fixed 40-byte little-endian records without header or padding.

One record is `{shard u32, off u64, len u32, raw_len u32, tokens u32, docs u32, ends_off u32, crc32 u32, flags u32}`:
`off` is the position in the tar of the first byte of the `tokens.npy` payload, `len` its stored and `raw_len` its
uncompressed length, `ends_off` how far before `off` the `ends.npy` payload begins. `crc32` covers the one stretch of
bytes from the first of the `ends.npy` payload to the last of the `tokens.npy` payload, tar header and padding between
included, so one read checks a whole block. `flags` has two halves. Of the low 16 bits, bit 0 says that the payload is
`tokens.npy.zst`, one zstd frame with its content size declared, and the others are 0; `len` is then the size of the
frame and `raw_len` that of the npy inside, while `crc32` always covers the stored bytes. The high 16 bits are the low
16 bits of the crc32 of the `ends.npy` payload with its padding to the tar header, so that the ends can be checked
without reading the tokens. The same records stand in each shard's tail member, so a lone tar describes itself. Opens no
shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.checksums import crc32
from dstrain.base.errors import DataError

INDEX_NAME = "blocks.idx"
RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("off", "<u8"),
        ("len", "<u4"),
        ("raw_len", "<u4"),
        ("tokens", "<u4"),
        ("docs", "<u4"),
        ("ends_off", "<u4"),
        ("crc32", "<u4"),
        ("flags", "<u4"),
    ]
)
"""40 bytes a block; 1 T tokens in blocks of 128Ki are 305 MB."""

FLAG_MASK = 0xFFFF
"""The half of `flags` that tells how a block is stored."""
FLAG_ZSTD = 1
"""The tokens are stored as one zstd frame."""
TAR_UNIT = 512
"""Tar headers and the padding of payloads, in bytes."""
MAX_MEMBER_BYTES = 64 << 20
"""Largest `tokens.npy` or `ends.npy` accepted, in bytes: bounds what a hostile index can make us allocate."""


def ends_checksum(data: bytes | memoryview) -> int:
    """The high half of `flags` for the bytes from the `ends.npy` payload up to the next tar header."""
    return crc32(data) & 0xFFFF


def read_index(path: Path, *, num_blocks: int) -> npt.NDArray[Any]:
    """Map an index file: (num_blocks,) records, read only when touched.

    Raises:
        DataError: the file is missing or its size is not `num_blocks` records.
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: the block index is missing. Copy the dataset again, or build it again") from None
    if size != num_blocks * RECORD.itemsize:
        raise DataError(
            f"{path}: {size} bytes, but {num_blocks} blocks need {num_blocks * RECORD.itemsize}. "
            "Copy the dataset again, or build it again"
        )
    if num_blocks == 0:
        return np.zeros(0, dtype=RECORD)
    return np.memmap(path, dtype=RECORD, mode="r")


def parse_records(data: bytes, *, source: str) -> npt.NDArray[Any]:
    """Records from bytes, e.g. of a shard's tail member.

    Raises:
        DataError: the length is not a whole number of records.
    """
    if len(data) % RECORD.itemsize:
        raise DataError(f"{source}: {len(data)} bytes are no whole number of {RECORD.itemsize}-byte records")
    return np.frombuffer(data, dtype=RECORD)


def check_records(
    records: npt.NDArray[Any], *, shard_bytes: npt.NDArray[np.int64], token_bytes: int, source: str
) -> None:
    """Refuse records that point outside their shard, overlap, or claim sizes that cannot be.

    Args:
        records: (n,) records in shard order.
        shard_bytes: size of each shard in bytes.
        token_bytes: bytes of one stored token id.
        source: the file named in messages.

    Raises:
        DataError: naming the first bad block.
    """
    shard = records["shard"].astype(np.int64)
    start = records["off"].astype(np.int64) - records["ends_off"].astype(np.int64)
    end = records["off"].astype(np.int64) + records["len"].astype(np.int64)
    known = shard < len(shard_bytes)
    limit = shard_bytes[np.where(known, shard, 0)] if len(shard_bytes) else np.zeros(len(records), dtype=np.int64)
    kind = records["flags"] & FLAG_MASK
    same_shard = shard[1:] == shard[:-1]
    # Comparisons, not differences: a hostile 64-bit offset must not wrap around.
    problems = {
        "points at an unknown shard": ~known,
        "lies outside its shard": (records["off"] > np.uint64(1 << 62)) | (start < 0) | (end > limit),
        "is larger than a member may be": (records["len"] > MAX_MEMBER_BYTES)
        | (records["raw_len"] > MAX_MEMBER_BYTES)
        | (records["ends_off"] > MAX_MEMBER_BYTES),
        "has no place for its document ends": records["ends_off"] < 2 * TAR_UNIT,
        "has an impossible number of tokens": (
            records["tokens"].astype(np.int64) * token_bytes >= records["raw_len"].astype(np.int64)
        ),
        "has an impossible number of documents": (records["docs"] == 0) | (records["docs"] > records["tokens"]),
        "is stored in an unknown way": (kind > FLAG_ZSTD) | ((kind == 0) & (records["len"] != records["raw_len"])),
        "is out of order": np.concatenate([[False], shard[1:] < shard[:-1]])[: len(records)],
        "overlaps the block before it": np.concatenate([[False], same_shard & (start[1:] < end[:-1])])[: len(records)],
    }
    for problem, bad in problems.items():
        if bad.any():
            block = int(np.argmax(bad))
            raise DataError(f"{source}: block {block} {problem}. The index is damaged: copy or build the dataset again")
