"""The one door to durable storage: publish, don't overwrite.

Small files are written beside their place, fsynced and renamed; directories are filled under a staging name and
published with one rename, then the parent is fsynced. Readers elsewhere trust only what a manifest vouches for. Remote
stores are only read, through `base.remote`; nothing above it opens a file for writing by itself, except the
append-only event log.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError, StorageError


def write_bytes(path: Path, data: bytes | memoryview) -> str:
    """Write a file whole or not at all, durably, and return its SHA-256 in hex.

    Raises:
        StorageError: the disk is full, read-only or failing; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_and_sync(temporary, data)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        _remove_quietly(temporary)
        raise _storage_error(path, error) from error
    return hashlib.sha256(data).hexdigest()


class NewFile:
    """A large file written piece by piece inside a staging folder, which is published as a whole later.

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
        try:
            self._file = open(path, "xb")
        except OSError as error:
            raise _storage_error(path, error) from error

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            StorageError: the disk is full or failing.
        """
        try:
            self._file.write(data)
        except OSError as error:
            raise _storage_error(self.path, error) from error
        self._digest.update(data)
        self.size_bytes += memoryview(data).nbytes

    def finish(self) -> str:
        """Make the content durable, close the file and return its SHA-256.

        Raises:
            StorageError: the disk is full or failing.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise _storage_error(self.path, error) from error
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file without promise; its folder is about to be removed."""
        try:
            self._file.close()
        except OSError:
            pass


def append_scratch(path: Path, data: bytes | bytearray) -> None:
    """Append to a scratch file inside a staging folder: not durable, removed before the folder is published.

    Raises:
        StorageError: the disk is full or failing.
    """
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        raise _storage_error(path, error) from error


def write_text(path: Path, text: str) -> str:
    """Write a UTF-8 text file whole or not at all; returns its SHA-256."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> str:
    """Write JSON (sorted keys, so equal data gives equal bytes) whole or not at all; returns its SHA-256."""
    return write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_json(path: Path, *, limit_bytes: int = 256 << 20) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, larger than `limit_bytes`, or not JSON.
    """
    try:
        if path.stat().st_size > limit_bytes:
            raise DataError(f"{path}: larger than {limit_bytes} bytes, refused as JSON")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def _write_and_sync(path: Path, data: bytes | memoryview) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = file.tell()
    size = memoryview(data).nbytes
    if written != size:
        raise OSError(errno.EIO, f"short write: {written} of {size} bytes")


def make_directory(path: Path) -> None:
    """Create a directory and its parents.

    Raises:
        StorageError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(path, error) from error


def publish_directory(staging: Path, final: Path) -> None:
    """Give a complete staging directory its final name in one step.

    Raises:
        StorageError: the final name exists with content, or the rename fails.
    """
    try:
        sync_directory(staging)
        os.rename(staging, final)
        sync_directory(final.parent)
    except OSError as error:
        raise _storage_error(final, error) from error


def remove_directory(path: Path) -> None:
    """Delete a tree by renaming it away first, so that no reader meets it half gone."""
    doomed = path.with_name(f".deleting-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _storage_error(path, error) from error
    shutil.rmtree(doomed, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path, *, chunk_bytes: int = 8 << 20) -> str:
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


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def _storage_error(path: Path, error: OSError) -> StorageError:
    reasons = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "your quota is used up: free some space",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "permission denied: choose a folder you may write to",
    }
    return StorageError(f"{path}: cannot be written: {reasons.get(error.errno or 0, str(error))}")
