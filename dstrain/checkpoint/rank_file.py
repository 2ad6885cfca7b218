"""Write one rank's file: in pieces, hashed, made durable, and read back from the disk. One attempt, in the calling thread.

Hashing has a thread of its own, and write-back is started piece by piece: processor, kernel and disk work at the same time, and
the final sync finds little left to do.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.errors import StorageError
from dstrain.base.storage import NewFile, NotDurableError, file_sha256, remove_file
from dstrain.checkpoint.snapshot import Listing, Snapshot

_PIECE_BYTES = 16 << 20


class SaveCancelledError(Exception):
    """The save was given up while this rank was still writing."""


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    name: str
    size_bytes: int
    sha256: str
    fragments: Listing
    read_back: bool
    """Whether the file was read from the disk again and had this hash."""


def write_part(path: Path, snapshot: Snapshot, *, verify: bool, cancelled: Callable[[], bool]) -> Part:
    """Write the snapshot as a safetensors file, durably.

    Args:
        path: the file, which must not exist.
        snapshot: what to write; must not change meanwhile.
        verify: read the file back and compare.
        cancelled: asked between pieces.

    Raises:
        StorageError: it could not be written, or what the disk gives back is not what was written.
        SaveCancelledError: `cancelled` said so.
    """
    file = _HashedAside(path)
    try:
        early = _WriteBack(path)
        try:
            for piece in snapshot.pieces(_PIECE_BYTES):
                if cancelled():
                    raise SaveCancelledError
                file.write(piece)
                early.start(piece.nbytes)
            sha256 = file.finish()
        finally:
            early.close()
    except (StorageError, SaveCancelledError):
        file.abandon()
        _remove_quietly(path)  # makes room for the report, and for another try
        raise
    if verify:
        check_from_disk(path, sha256)
    return Part(path.name, file.size_bytes, sha256, snapshot.listing, verify)


def check_from_disk(path: Path, sha256: str) -> None:
    """Compare a durable file's hash, read from the disk and not from the page cache where the system allows it.

    Raises:
        StorageError: it cannot be read or differs.
    """
    try:
        drop_cached(path)
        found = file_sha256(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read back: {error}: the disk is failing") from error
    if found != sha256:
        raise StorageError(f"{path}: the disk gives back other bytes than were written (SHA-256): replace it")


def drop_cached(path: Path) -> None:
    """Ask the kernel to forget its copy of a file that is durable; a file system that does not know how may ignore it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass
    finally:
        os.close(handle)


def is_full(error: BaseException) -> bool:
    """Whether a fault means that there is no room: disk, quota.

    Not where the rename was done: what it replaced is needed until the new name is durable, so nothing may be deleted then.
    """
    if isinstance(error, NotDurableError):
        return False
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _remove_quietly(path: Path) -> None:
    try:
        remove_file(path)
    except StorageError:
        pass  # its folder is removed with the save


class _HashedAside(NewFile):
    """A file whose bytes are hashed by another thread while they are written: a snapshot holds still for both."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._aside = _Aside()
        self._digest = self._aside  # type: ignore[assignment]

    def abandon(self) -> None:
        """Close the file without promise and let go of the bytes."""
        self._aside.stop()
        super().abandon()


class _Aside:
    """SHA-256 in a thread of its own, in the order of the updates; has the two methods of a hash that a file uses."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="dstrain-save-hash", daemon=True)
        self._thread.start()

    def update(self, piece: memoryview) -> None:
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        self._pieces.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def stop(self) -> None:
        self._stopped = True
        self._pieces.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None and not self._stopped:
            self._digest.update(piece)


class _WriteBack:
    """Starts writing dirty pages to the disk: DONTNEED on dirty pages does that, and keeps them."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self._at = 0
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError:
            pass  # only slower

    def start(self, num_bytes: int) -> None:
        if self._handle is not None:
            try:
                os.posix_fadvise(self._handle, self._at, num_bytes, os.POSIX_FADV_DONTNEED)
            except OSError:
                pass
        self._at += num_bytes

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
