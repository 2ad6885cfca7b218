"""Read blocks of a local dataset at random: one `pread` a block, checked by crc32 before a token leaves.

Threads, not processes: any number of threads may call one `ShardDataset`. Nothing is unpickled or extracted; the two
npy members are parsed by offset under tight bounds. A damaged, cut or missing shard is a `DataError` that names shard,
block and mend, never a wrong token. Does not cache blocks, pack rows or know an order. Remote stores come later.
"""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.base.storage import file_sha256
from dstrain.data.block_index import INDEX_NAME, TAR_UNIT, check_records, ends_checksum, read_index
from dstrain.data.manifest import read_manifest

MAX_OPEN_FILES = 128
_MAX_NPY_HEADER_BYTES = 1024
_MEND = "Copy the shard again or rebuild the dataset; `dstrain shards verify` lists all damage"


@dataclass(frozen=True)
class Block:
    """Whole documents, back to back, without special tokens."""

    tokens: npt.NDArray[Any]
    """(tokens,) uint16 or uint32 ids, read-only."""
    ends: npt.NDArray[np.uint32]
    """(documents,) cumulative ends: document d is tokens[ends[d-1]:ends[d]]. Strictly increasing to len(tokens)."""


class ShardDataset:
    """A folder of block shards.

    Attributes:
        path: the folder.
        manifest: its checked table of contents.
        blocks: (num_blocks,) records of `block_index.RECORD`.
    """

    def __init__(self, path: Path, *, check_shards: bool = True):
        """Check manifest, index and the presence and size of every shard; no payload is read.

        Args:
            path: the dataset's folder.
            check_shards: False leaves missing and cut shards to the first read of one of their blocks.

        Raises:
            DataError: naming the file and the fix.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        index = self.path / INDEX_NAME
        self.blocks = read_index(index, num_blocks=self.manifest.num_blocks)
        if file_sha256(index) != self.manifest.index_sha256:
            raise DataError(f"{index}: sha256 differs from the manifest. Copy the dataset again, or build it again")
        sizes = np.array([shard.bytes for shard in self.manifest.shards], dtype=np.int64)
        check_records(self.blocks, shard_bytes=sizes, token_bytes=self._dtype.itemsize, source=str(index))
        for shard in self.manifest.shards if check_shards else ():
            self._check_size(shard.name, shard.bytes)
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends of a block, (documents,) uint32; reads and checks only them, no token.

        Raises:
            DataError: the block is damaged.
        """
        record = self._record(block)
        length = int(record["ends_off"]) - TAR_UNIT
        data = self._pread(block, int(record["off"]) - int(record["ends_off"]), length)
        if ends_checksum(data) != int(record["flags"]) >> 16:
            raise self._damaged(block, "the checksum of the document ends does not match")
        return self._parse_ends(block, memoryview(data))

    def read(self, block: int) -> Block:
        """Read and check one block; safe from any thread.

        Raises:
            IndexError: there is no such block.
            DataError: the shard is missing, cut or damaged, or an id is not below the vocabulary size.
        """
        record = self._record(block)
        ends_length, length = int(record["ends_off"]), int(record["len"])
        data = self._pread(block, int(record["off"]) - ends_length, ends_length + length)
        if zlib.crc32(data) != int(record["crc32"]):
            raise self._damaged(block, "the checksum (crc32) does not match")
        ends = self._parse_ends(block, memoryview(data)[:ends_length])
        try:
            tokens = parse_npy(
                memoryview(data)[ends_length:], count=int(record["tokens"]), dtype=self._dtype, exact=True
            )
        except ValueError as error:
            raise self._damaged(block, str(error)) from None
        if int(tokens.max()) >= self.manifest.vocab_size:
            raise self._damaged(block, f"id {int(tokens.max())} is not below vocab_size {self.manifest.vocab_size}")
        return Block(tokens=tokens, ends=ends)

    def close(self) -> None:
        """Close the shards' files; a later read opens them again."""
        with self._lock:
            self._files.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers open files of their own.
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardDataset.__init__(self, state["path"])

    def _record(self, block: int) -> Any:
        if not 0 <= block < len(self.blocks):
            raise IndexError(f"block {block} of {len(self.blocks)}")
        return self.blocks[block]

    def _parse_ends(self, block: int, data: memoryview) -> npt.NDArray[np.uint32]:
        record = self.blocks[block]
        try:
            ends = parse_npy(data, count=int(record["docs"]), dtype=np.dtype("<u4"), exact=False)
        except ValueError as error:
            raise self._damaged(block, str(error)) from None
        if int(ends[-1]) != int(record["tokens"]) or int(ends[0]) == 0 or (ends[1:] <= ends[:-1]).any():
            raise self._damaged(block, "the document ends are not increasing up to the number of tokens")
        return ends

    def _pread(self, block: int, offset: int, length: int) -> bytes:
        file = self._open(int(self.blocks[block]["shard"]))
        pieces: list[bytes] = []
        wanted = length
        try:
            while wanted:
                piece = os.pread(file.handle, wanted, offset + length - wanted)
                if not piece:
                    raise self._damaged(block, "the shard ends in the middle of this block")
                pieces.append(piece)
                wanted -= len(piece)
        except OSError as error:
            raise self._damaged(block, f"reading failed: {error}") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _open(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                entry = self.manifest.shards[shard]
                self._check_size(entry.name, entry.bytes)
                file = _OpenFile(self.path / entry.name)
                self._files[shard] = file
                # A file dropped here closes when its last reader is done with it.
                while len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return file

    def _check_size(self, name: str, expected: int) -> None:
        path = self.path / name
        try:
            size = path.stat().st_size
        except OSError:
            raise DataError(f"{path}: this shard is missing. {_MEND}") from None
        if size != expected:
            raise DataError(f"{path}: {size} bytes, the manifest says {expected}: cut or replaced. {_MEND}")

    def _damaged(self, block: int, reason: str) -> DataError:
        name = self.manifest.shards[int(self.blocks[block]["shard"])].name
        return DataError(f"{self.path / name}: block {block} is damaged: {reason}. {_MEND}")


class _OpenFile:
    """A file descriptor that closes itself when the last user lets go."""

    def __init__(self, path: Path):
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error}. {_MEND}") from error

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            os.close(handle)


def parse_npy(data: memoryview, *, count: int, dtype: np.dtype[Any], exact: bool) -> npt.NDArray[Any]:
    """A read-only view of a 1-D npy payload whose header must say just what is expected.

    Args:
        data: the payload, possibly followed by padding.
        count: items it must hold.
        dtype: their little-endian type.
        exact: refuse bytes after the items.

    Raises:
        ValueError: it is no such npy payload.
    """
    head = io.BytesIO(bytes(data[:_MAX_NPY_HEADER_BYTES]))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("unknown npy version")
    shape, fortran, found = np.lib.format.read_array_header_1_0(head, max_header_size=_MAX_NPY_HEADER_BYTES)
    if found != dtype or shape != (count,) or fortran:
        raise ValueError(f"the npy header says {found} {shape}, the index {dtype} ({count},)")
    start = head.tell()
    stop = start + count * dtype.itemsize
    if stop > len(data) or (exact and stop != len(data)):
        raise ValueError(f"{len(data)} bytes cannot hold exactly {count} items")
    return np.frombuffer(data[start:stop], dtype=dtype)
