"""Where a dataset's bytes come from: the Protocol of a byte store, local folders, and the settings of remote ones.

A store answers `read(name, offset, length)` with exactly those bytes or raises. `data.remote_store` adds retries over
object stores, `data.cached_store` adds reading ahead and a node-local cache. Knows nothing of tars, blocks or checksums.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.base.errors import DataError, StorageError

MAX_OPEN_FILES = 128
MEND = "Copy the shard again or rebuild the dataset; `dstrain shards verify` lists all damage"


class StorageConfig(Config):
    """How remote shards are read (s3://, gs://, az://, https://, hf://); local folders need none of it."""

    cache_dir: Path | None = None
    """Folder on a local disk of each node, shared by its ranks, that keeps what was downloaded. Entries are named by content,
    so several datasets and runs may share it. Default: none, every epoch downloads again."""
    cache_limit_bytes: int = Field(default=64 << 30, ge=1 << 16)
    """Most the cache may hold, in bytes. What the plan needs last goes first; must hold prefetch_bytes of every rank on the node."""
    prefetch_bytes: int = Field(default=256 << 20, ge=1 << 12)
    """Bytes fetched ahead of need per rank: the horizon. Without a cache_dir they are kept in memory."""
    connections: int = Field(default=16, ge=1, le=256)
    """Requests in flight per rank. Object stores answer each slowly and many at once: 8 or more."""
    range_bytes: int = Field(default=8 << 20, ge=1 << 12, le=64 << 20)
    """Neighbouring blocks are fetched in one request up to about this many bytes; 8 to 16 MB amortise a request's latency."""
    gap_bytes: int = Field(default=64 << 10, ge=0, le=8 << 20)
    """Bytes nobody asked for that may lie between two blocks fetched in one request; counted against 1/16 of a request."""
    deadline_s: float = Field(default=300.0, gt=0)
    """Seconds in which a read must succeed, all tries included; then the run stops with a message, and can be resumed."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds for one try, the whole body included; a try that takes longer is given up and made again."""
    connect_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds until a connection to an S3 store must stand."""
    anonymous: bool = False
    """Send no credentials: for public buckets."""

    @model_validator(mode="after")
    def _room_for_the_horizon(self) -> StorageConfig:
        if self.cache_dir is not None and self.cache_limit_bytes < self.prefetch_bytes:
            raise ValueError(
                f"cache_limit_bytes {self.cache_limit_bytes} is below prefetch_bytes {self.prefetch_bytes}: "
                "what is fetched ahead would push itself out; raise the one or lower the other"
            )
        return self


class Extent(NamedTuple):
    """Some bytes of a file of a store."""

    name: str
    offset: int
    length: int


class ByteStore(Protocol):
    """Files of one folder, readable at any place, from any thread."""

    @property
    def name(self) -> str:
        """Folder or URL for messages, without secrets."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the file `name` from `offset` on.

        Raises:
            DataError: the file is missing, unreadable or shorter than that.
            StorageError: the store cannot be reached within its deadline.
        """
        ...

    def read_again(self, name: str, offset: int, length: int) -> bytes:
        """As `read`, but from the origin: what is cached or fetched ahead of these bytes is thrown away."""
        ...

    def size(self, name: str) -> int:
        """Size of a file in bytes; raises as `read` does."""
        ...

    def will_need(self, extents: Sequence[Extent]) -> None:
        """What will be read next, soonest first; replaces what was said before. Only a hint."""
        ...

    def close(self) -> None:
        """Let go of files, connections and threads; a later read may open them again."""
        ...


class LocalStore:
    """Files of a local folder, read with `pread` through a bounded number of open files."""

    def __init__(self, folder: Path) -> None:
        """Open nothing yet.

        Args:
            folder: the folder.
        """
        self.folder = folder
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes; see `ByteStore.read`."""
        file = self._open(name)
        pieces: list[bytes] = []
        wanted = length
        while wanted:
            try:
                piece = os.pread(file.handle, wanted, offset + length - wanted)
            except OSError as error:
                raise StorageError(f"{self.folder / name}: reading failed: {error}") from error
            if not piece:
                raise DataError(f"{self.folder / name}: ends at byte {offset + length - wanted}: cut. {MEND}")
            pieces.append(piece)
            wanted -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_again(self, name: str, offset: int, length: int) -> bytes:
        """The same bytes, through a newly opened file: it may have been put right meanwhile."""
        with self._lock:
            self._files.pop(name, None)
        return self.read(name, offset, length)

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            raise DataError(f"{self.folder / name}: this shard is missing. {MEND}") from None

    def will_need(self, extents: Sequence[Extent]) -> None:
        """Nothing: local bytes are read when they are asked for."""

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            self._files.clear()

    def _open(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = _OpenFile(self.folder / name)
                self._files[name] = file
                # A file dropped here closes when its last reader is done with it.
                while len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return file


class _OpenFile:
    """A file descriptor that closes itself when the last user lets go."""

    def __init__(self, path: Path):
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"{path}: this shard is missing. {MEND}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error}. {MEND}") from error

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            os.close(handle)
