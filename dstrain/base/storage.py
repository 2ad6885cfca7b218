"""The one door to durable storage: publish, don't overwrite.

Small files are written beside their place, fsynced and renamed; directories are filled under a staging name and
published with one rename, then the parent is fsynced. Readers elsewhere trust only what a manifest vouches for. Remote
stores are only read, through `base.remote`; nothing above it opens a file for writing by itself, except the
append-only event log. Every call that changes the disk goes through `base.file_operations`, one object that tests
replace, so each of them can be made to fail, to kill the process or to forget what was not fsynced.

A failed fsync may have dropped the dirty pages and cleared the error, so that a second fsync on the same handle
succeeds without having written anything. Nothing here tries again: the file is closed and thrown away, and whoever
wants another try writes another file from the data in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError, ExitCode, StorageError
from dstrain.base.file_operations import FileOperations, operations
from dstrain.base.file_operations import operations_replaced as operations_replaced

CHUNK_BYTES = 8 << 20
"""Bytes hashed, then written, at a time: they are still in the processor's cache for the second."""

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder you may write to",
    errno.EPERM: "permission denied: choose a folder you may write to",
    errno.EIO: "the device reports an input/output error: look at the kernel log, or choose another disk",
    errno.ESTALE: "the network file system lost its handle (ESTALE): mount it again, or start again",
    errno.EFBIG: "the file would be larger than is allowed here: raise `ulimit -f`, or choose another file system",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
    errno.EEXIST: "the name is taken already (File exists): choose another folder",
    errno.ENOTEMPTY: "the name is taken already by a folder with content: choose another folder",
}


_WRONG_NAMES = frozenset({errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST})
"""The name is at fault, not the disk: the same command fails again."""


class NotDurableError(StorageError):
    """What was to be published is in its place, whole, but its name may be gone after a power loss.

    Raised instead of a plain StorageError when the rename was done and only the sync of the folder around it failed.
    Whoever catches it may read what was published, and keeps what it was to replace.
    """


def write_bytes(path: Path, data: bytes | memoryview) -> str:
    """Write a file whole or not at all, durably, and return its SHA-256 in hex.

    Raises:
        StorageError: the disk is full, read-only or failing; nothing is left behind.
        NotDurableError: the new content is there, but the old one may come back after a power loss.
    """
    temporary = _beside(path)
    try:
        digest = _write_new(temporary, data, final=path)
        operations().rename(temporary, path)
    except OSError as error:
        _remove_quietly(temporary)
        raise _storage_error(path, error) from error
    _sync_after_rename(path)
    return digest


class NewFile:
    """A large file written piece by piece inside a staging folder, which is published as a whole later.

    After any failure the file is good for nothing but `abandon`: it is never fsynced again.

    Attributes:
        path: the file.
        size_bytes: bytes written so far.
    """

    def __init__(self, path: Path):
        """Create the file; it must not exist.

        Raises:
            StorageError: it cannot be created.
        """
        self.path = path
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._operations = operations()
        self._handle: int | None = None
        try:
            self._handle = self._operations.create(path)
        except OSError as error:
            raise _storage_error(path, error) from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes: each chunk is hashed, then written, without a copy; the caller may change them afterwards.

        Raises:
            StorageError: the disk is full or failing.
        """
        handle = self._opened()
        view = memoryview(data)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        for begin in range(0, view.nbytes, CHUNK_BYTES):
            chunk = view[begin : begin + CHUNK_BYTES]
            self._digest.update(chunk)
            try:
                _write_whole(self._operations, handle, chunk)
            except OSError as error:
                raise _storage_error(self.path, error) from error
            self.size_bytes += chunk.nbytes

    def finish(self) -> str:
        """Make the content durable, close the file and return its SHA-256.

        Raises:
            StorageError: the disk is full or failing, or the file does not have the length that was written.
        """
        handle = self._opened()
        try:
            self._operations.fsync(handle)
            length = self._operations.size(handle)
            if length != self.size_bytes:
                raise OSError(errno.EIO, f"{length} bytes are there of {self.size_bytes} that were written")
            self._handle = None
            self._operations.close(handle)
        except OSError as error:
            self.abandon()
            raise _storage_error(self.path, error) from error
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file without promise; its folder is about to be removed."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _close_quietly(self._operations, handle)

    def _opened(self) -> int:
        if self._handle is None:
            raise ValueError(f"{self.path} is closed")
        return self._handle


def append_scratch(path: Path, data: bytes | bytearray) -> None:
    """Append to a scratch file inside a staging folder: not durable, removed before the folder is published.

    Raises:
        StorageError: the disk is full or failing.
    """
    doing = operations()
    try:
        handle = doing.open_append(path)
        try:
            _write_whole(doing, handle, memoryview(data))
        finally:
            doing.close(handle)
    except OSError as error:
        raise _storage_error(path, error) from error


def write_text(path: Path, text: str) -> str:
    """Write a UTF-8 text file whole or not at all; returns its SHA-256."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> str:
    """Write JSON (sorted keys, so equal data gives equal bytes) whole or not at all; returns its SHA-256."""
    return write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a file that must not exist yet, whole, durable and in one step; of several who try, one succeeds.

    Returns:
        Whether this call made it.

    Raises:
        StorageError: it cannot be written.
        NotDurableError: it is made, but may be gone after a power loss.
    """
    temporary = _beside(path)
    _write_new(temporary, data, final=path)
    try:
        return link_exclusively(temporary, path)
    finally:
        _remove_quietly(temporary)


def link_exclusively(temporary: Path, final: Path) -> bool:
    """Give a finished file its final name unless that is taken, durably; the temporary name stays.

    Returns:
        Whether the final name is this file's; False when another holds it.

    Raises:
        StorageError: the file system cannot do it.
        NotDurableError: it is linked, but the name may be gone after a power loss.
    """
    try:
        operations().link(temporary, final)
    except FileExistsError:
        if not _is_same_file(temporary, final):  # over NFS a repeated request finds its own success
            return False
    except OSError as error:
        raise _storage_error(final, error) from error
    _sync_after_rename(final)
    return True


def copy_file(source: Path, target: Path) -> str:
    """Copy a file into a staging folder, durably, and return the SHA-256 of the bytes read; the target must not exist.

    Raises:
        StorageError: one cannot be read or the other written; no part of the target is left.
    """
    doing = operations()
    try:
        handle = doing.open_read(source)
    except OSError as error:
        raise StorageError(f"{source}: cannot be read: {error}") from error
    try:
        file = NewFile(target)
        try:
            buffer = memoryview(bytearray(CHUNK_BYTES))
            while count := _read(doing, handle, buffer, source):
                file.write(buffer[:count])
            return file.finish()
        except StorageError:
            file.abandon()
            _remove_quietly(target)
            raise
    finally:
        _close_quietly(doing, handle)


def read_json(path: Path, *, limit_bytes: int = 256 << 20) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, larger than `limit_bytes`, or not JSON.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise DataError(f"{path}: not readable as JSON: it is not a file")
        if found.st_size > limit_bytes:
            raise DataError(f"{path}: larger than {limit_bytes} bytes, refused as JSON")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably: what is published inside must not vanish with a name further up.

    Raises:
        StorageError: it cannot be created, or is a file.
    """
    try:
        if path.is_dir():
            return
        if not path.parent.exists():
            make_directory(path.parent)
        operations().make_directory(path)
        operations().sync_directory(path.parent)
    except OSError as error:
        if not (isinstance(error, FileExistsError) and path.is_dir()):  # another process was faster: the same result
            raise _storage_error(path, error) from error


def publish_directory(staging: Path, final: Path) -> None:
    """Give a complete staging directory its final name in one step.

    Raises:
        StorageError: the final name exists with content, or the rename fails; nothing is published.
        NotDurableError: it is published, whole, but may be gone after a power loss.
    """
    try:
        operations().sync_directory(staging)
        operations().rename(staging, final)
    except OSError as error:
        raise _storage_error(final, error) from error
    _sync_after_rename(final)


def rename(source: Path, target: Path) -> None:
    """Move a file or a directory inside one file system, durably.

    Raises:
        StorageError: the rename fails; nothing is moved.
        NotDurableError: it is moved, but may be back after a power loss.
    """
    try:
        operations().rename(source, target)
    except OSError as error:
        raise _storage_error(target, error) from error
    _sync_after_rename(target)
    if source.parent != target.parent:
        _sync_after_rename(source)


def remove_file(path: Path) -> None:
    """Remove a file's name; a missing one is no fault. Not durable: after a power loss it may be back.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        operations().unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _storage_error(path, error) from error


def remove_directory(path: Path) -> None:
    """Delete a tree by renaming it away first, so that no reader meets it half gone, not after a power loss either.

    Raises:
        StorageError: it cannot be renamed away. What then cannot be deleted stays as `.deleting-*`, without a fault.
    """
    doomed = path.with_name(f".deleting-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        operations().rename(path, doomed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _storage_error(path, error) from error
    _sync_after_rename(path)
    discard_directory(doomed)


def discard_directory(path: Path) -> None:
    """Delete a tree that nobody reads (staging, leftovers) as far as that goes; follows no link, raises nothing."""
    try:
        with os.scandir(path) as entries:
            inside = [(Path(entry.path), entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError:
        return
    for entry, is_folder in inside:
        if is_folder:
            discard_directory(entry)
        else:
            _remove_quietly(entry)
    try:
        operations().remove_directory(path)
    except OSError:
        pass


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        StorageError: the disk is failing.
    """
    try:
        operations().sync_directory(path)
    except OSError as error:
        raise _storage_error(path, error) from error


def file_sha256(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> str:
    """SHA-256 of a file in hex, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the file system that holds `path` (or its nearest existing parent)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _write_new(temporary: Path, data: bytes | memoryview, *, final: Path) -> str:
    """Write a durable file that gets its final name later; after a failure nothing of it is left."""
    file = None
    try:
        file = NewFile(temporary)
        file.write(data)
        return file.finish()
    except StorageError as error:
        if file is not None:
            file.abandon()
            _remove_quietly(temporary)
        cause = error.__cause__
        raise (_storage_error(final, cause) if isinstance(cause, OSError) else error) from cause


def _write_whole(doing: FileOperations, handle: int, data: memoryview) -> None:
    """Write until all is taken: the system takes part of the data without an error, e.g. before a size limit."""
    while data.nbytes:
        written = doing.write(handle, data)
        if not 0 < written <= data.nbytes:
            raise OSError(errno.EIO, f"short write: {written} of {data.nbytes} bytes")
        data = data[written:]


def _read(doing: FileOperations, handle: int, buffer: memoryview, source: Path) -> int:
    try:
        return doing.read(handle, buffer)
    except OSError as error:
        raise StorageError(f"{source}: cannot be read: {error}") from error


def _sync_after_rename(path: Path) -> None:
    try:
        operations().sync_directory(path.parent)
    except OSError as error:
        raise NotDurableError(
            f"{path}: is in place, but its folder could not be synced, so a power loss may undo that: {error}"
        ) from error


def _close_quietly(doing: FileOperations, handle: int) -> None:
    try:
        doing.close(handle)
    except OSError:
        pass


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _remove_quietly(path: Path) -> None:
    try:
        operations().unlink(path)
    except OSError:
        pass


def _storage_error(path: Path, error: OSError) -> StorageError:
    fault = StorageError(f"{path}: cannot be written: {_REASONS.get(error.errno or 0, str(error))}")
    if error.errno in _WRONG_NAMES:
        fault.exit_code = ExitCode.BAD_INPUT
    return fault
