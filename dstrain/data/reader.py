"""Read blocks of a dataset at random: one ranged read a block, checked by crc32 before a token leaves.

The dataset lies in a local folder or behind the URL of one. Threads, not processes: any number of threads may call one
`ShardDataset`. Nothing is unpickled or extracted; the two npy members are parsed by offset under tight bounds. Bytes that
fail their check are read once more from the origin; then a damaged, cut or missing shard is a `DamagedBlockError` that
names shard, block and mend, never a wrong token. Does not keep decoded blocks, pack rows or know an order.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from dstrain.base.checksums import crc32
from dstrain.base.errors import DamagedBlockError, DataError
from dstrain.base.locations import Location, RemoteUrl, child_location, parse_location
from dstrain.base.protocols import ShouldLeave, never
from dstrain.data.block_index import FLAG_ZSTD, TAR_UNIT, ends_checksum
from dstrain.data.blocks import Block
from dstrain.data.contents import open_contents
from dstrain.data.stores import MEND, ByteStore, Extent, StorageConfig

_MAX_NPY_HEADER_BYTES = 1024
_NPY_HEADER_BYTES = 128
_ENDS_AHEAD = 256  # blocks; a start-up walks through all document ends in order

_Parsed = TypeVar("_Parsed")


class ShardDataset:
    """Block shards in a folder or behind a URL.

    Attributes:
        path: the folder, or the checked URL.
        manifest: its checked table of contents.
        blocks: (num_blocks,) records of `block_index.RECORD`.
    """

    def __init__(
        self, path: str | Path | RemoteUrl, *, check_shards: bool = True, storage: StorageConfig | None = None,
        should_leave: ShouldLeave = never,
    ) -> None:  # fmt: skip
        """Check manifest and index, and of local shards presence and size; no payload is read.

        Args:
            path: the dataset's folder or its URL.
            check_shards: False leaves missing and cut shards to the first read of one of their blocks, which is always
                so for remote ones.
            storage: how remote shards are read.
            should_leave: whether a read of a remote shard, from any thread, raises `Interrupted` rather than wait on.

        Raises:
            DataError: naming the file and the fix; or the URL is refused.
            ConfigError: a package for this store is missing, or the cache is too small.
            StorageError: the store cannot be reached within its deadline.
        """
        self.path: Location = parse_location(path)
        self._storage = storage or StorageConfig()
        contents = open_contents(self.path, self._storage, should_leave=should_leave)
        self.manifest, self.blocks = contents.manifest, contents.blocks
        self._store: ByteStore = contents.store
        self._notes = contents.notes
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._next_ends = 0
        if isinstance(self.path, Path) and check_shards:
            for shard in self.manifest.shards:
                self._check_size(shard.name, shard.bytes)
        self._sound = set[int]()  # shards whose size was checked

    @property
    def name(self) -> str:
        """The folder, or the URL without secrets, for messages."""
        return str(self.path)

    @property
    def notes_folder(self) -> Path | None:
        """Where small files about the dataset may be kept: its folder, or for a remote one the node's cache."""
        return self.path if isinstance(self.path, Path) else self._notes

    def will_need(self, blocks: Sequence[int]) -> None:
        """Fetch these blocks of a remote dataset ahead, soonest first; replaces what was said before.

        Costs some microseconds a block: say it once for many steps rather than at each.
        """
        if isinstance(self.path, RemoteUrl):
            self._next_ends = -1  # training has begun: the plan is the caller's from now on
            self._store.will_need([self._extent(block) for block in blocks])

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends of a block, (documents,) uint32; reads and checks only them, no token.

        Raises:
            IndexError: there is no such block.
            DamagedBlockError: the block is damaged.
            StorageError: the store cannot be reached within its deadline.
        """
        if block == self._next_ends and isinstance(self.path, RemoteUrl):
            self._read_ends_ahead(block)
        return self._checked(block, self._ends_extent(block), self._parse_ends_alone)

    def read(self, block: int) -> Block:
        """Read and check one block; safe from any thread.

        Raises:
            IndexError: there is no such block.
            DamagedBlockError: the shard is missing, cut or damaged, or an id is not below the vocabulary size.
            StorageError: the store cannot be reached within its deadline.
        """
        return self._checked(block, self._extent(block), self._parse_block)

    def close(self) -> None:
        """Let go of files, connections and threads; a later read of local shards opens them again."""
        self._store.close()

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers open files and connections of their own.
        return {"path": self.path, "storage": self._storage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardDataset.__init__(self, state["path"], storage=state["storage"])

    def _checked(self, block: int, extent: Extent, parse: Callable[[int, bytes], _Parsed]) -> _Parsed:
        """Parse the bytes; if they are not what was written, once more from the origin, past every cache."""
        shard = int(self.blocks[block]["shard"])
        try:
            if isinstance(self.path, Path) and shard not in self._sound:
                entry = self.manifest.shards[shard]
                self._check_size(entry.name, entry.bytes)
                self._sound.add(shard)
            try:
                return parse(block, self._store.read(*extent))
            except (ValueError, DataError):
                return parse(block, self._store.read_again(*extent))
        except ValueError as error:
            raise self._damaged(block, str(error)) from None
        except DataError as error:
            message = f"{error} (block {block} was asked for)"
            raise DamagedBlockError(message, dataset=self.name, block=block) from None

    def _record(self, block: int) -> Any:
        if not 0 <= block < len(self.blocks):
            raise IndexError(f"block {block} of {len(self.blocks)}")
        return self.blocks[block]

    def _extent(self, block: int) -> Extent:
        record = self._record(block)
        ends_off = int(record["ends_off"])
        name = self.manifest.shards[int(record["shard"])].name
        return Extent(name, int(record["off"]) - ends_off, ends_off + int(record["len"]))

    def _ends_extent(self, block: int) -> Extent:
        whole = self._extent(block)
        return Extent(whole.name, whole.offset, int(self.blocks[block]["ends_off"]) - TAR_UNIT)

    def _read_ends_ahead(self, block: int) -> None:
        last = min(block + _ENDS_AHEAD, len(self.blocks))
        self._next_ends = last
        self._store.will_need([self._ends_extent(b) for b in range(block, last)])

    def _parse_ends_alone(self, block: int, data: bytes) -> npt.NDArray[np.uint32]:
        if ends_checksum(data) != int(self.blocks[block]["flags"]) >> 16:
            raise ValueError("the checksum of the document ends does not match")
        return self._parse_ends(block, memoryview(data))

    def _parse_block(self, block: int, data: bytes) -> Block:
        record = self.blocks[block]
        ends_length = int(record["ends_off"])
        if crc32(data) != int(record["crc32"]):
            raise ValueError("the checksum (crc32) does not match")
        ends = self._parse_ends(block, memoryview(data)[:ends_length])
        payload = memoryview(data)[ends_length:]
        if int(record["flags"]) & FLAG_ZSTD:
            payload = unpack_zstd(payload, raw_length=int(record["raw_len"]))
        tokens = parse_npy(payload, count=int(record["tokens"]), dtype=self._dtype, exact=True)
        if int(tokens.max()) >= self.manifest.vocab_size:
            raise ValueError(f"id {int(tokens.max())} is not below vocab_size {self.manifest.vocab_size}")
        return Block(tokens=tokens, ends=ends)

    def _parse_ends(self, block: int, data: memoryview) -> npt.NDArray[np.uint32]:
        record = self.blocks[block]
        ends = parse_npy(data, count=int(record["docs"]), dtype=np.dtype("<u4"), exact=False)
        if int(ends[-1]) != int(record["tokens"]) or int(ends[0]) == 0 or (ends[1:] <= ends[:-1]).any():
            raise ValueError("the document ends are not increasing up to the number of tokens")
        return ends

    def _check_size(self, name: str, expected: int) -> None:
        size = self._store.size(name)
        if size != expected:
            shown = child_location(self.path, name)
            raise DataError(f"{shown}: {size} bytes, the manifest says {expected}: cut or replaced. {MEND}")

    def _damaged(self, block: int, reason: str) -> DamagedBlockError:
        name = self.manifest.shards[int(self.blocks[block]["shard"])].name
        message = f"{child_location(self.path, name)}: block {block} is damaged: {reason}. {MEND}"
        return DamagedBlockError(message, dataset=self.name, block=block)


_threads = threading.local()  # a zstd context serves one thread at a time


def unpack_zstd(data: memoryview, *, raw_length: int) -> memoryview:
    """The content of one zstd frame whose declared size must be `raw_length`, which the caller has bounded.

    Raises:
        ValueError: it is no such frame.
    """
    try:
        # Before anything is allocated: a bomb declares more than the index does, or nothing.
        declared = zstandard.get_frame_parameters(data).content_size
        if declared != raw_length:
            raise ValueError(f"the zstd frame declares {declared} bytes, the index {raw_length}")
        if not hasattr(_threads, "zstd"):
            _threads.zstd = zstandard.ZstdDecompressor()
        content = _threads.zstd.decompress(data, max_output_size=raw_length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not one whole zstd frame: {error}") from None
    if len(content) != raw_length:
        raise ValueError(f"the zstd frame holds {len(content)} bytes, the index says {raw_length}")
    return memoryview(content)


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
    expected = _npy_header(count, dtype)
    start = len(expected) if data[: len(expected)] == expected else _parsed_header(data, count, dtype)
    stop = start + count * dtype.itemsize
    if stop > len(data) or (exact and stop != len(data)):
        raise ValueError(f"{len(data)} bytes cannot hold exactly {count} items")
    return np.frombuffer(data[start:stop], dtype=dtype)


def _npy_header(count: int, dtype: np.dtype[Any]) -> bytes:
    """The header that dstrain's writer and `numpy.save` give a 1-D array: comparing it is 50 times as fast as parsing it."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}".encode()
    return b"\x93NUMPY\x01\x00v\x00" + text.ljust(_NPY_HEADER_BYTES - 11) + b"\n"


def _parsed_header(data: memoryview, count: int, dtype: np.dtype[Any]) -> int:
    """Length of another header that says the same."""
    head = io.BytesIO(bytes(data[:_MAX_NPY_HEADER_BYTES]))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("unknown npy version")
    shape, fortran, found = np.lib.format.read_array_header_1_0(head, max_header_size=_MAX_NPY_HEADER_BYTES)
    if found != dtype or shape != (count,) or fortran:
        raise ValueError(f"the npy header says {found} {shape}, the index {dtype} ({count},)")
    return head.tell()
