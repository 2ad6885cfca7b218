"""A node-local cache of byte ranges, named by content and shared by the processes of one user on a node.

Layout: `<cache_dir>/dstrain-cache-v1-<uid>/` (0700) with `entries/xx/<sha256 of the file>-<offset>-<length>`, `leases/`,
`usage` and `lock`. An entry appears by one link of a complete, fsynced file. A process tells what it needs next in a lease,
a file it holds a flock on, so the lease ends with the process, however that ends. Checksums are the reader's: an entry
that fails them is dropped and fetched again. Makes no requests and knows no URL.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dstrain.base.errors import ConfigError, StorageError
from dstrain.data.cache_leases import Lease, live_leases, protected_and_next_use

LOCK_PATIENCE_S = 30.0
"""A process that is stopped while it holds the lock keeps others from filling the cache this long; they then go without it."""
_BATCH_SHARE = 50  # an eviction frees at least 1/50 of the limit, so that the folder is not listed for every entry

_KEY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{1,16}-[0-9a-f]{1,16}")


def cache_key(sha256: str, offset: int, length: int) -> str:
    """Name of the bytes [offset, offset + length) of the file with this SHA-256."""
    return f"{sha256}-{offset:x}-{length:x}"


class DiskCache:
    """Entries of one cache folder. Any thread and any process of the user may use it at once."""

    def __init__(self, folder: Path, *, limit_bytes: int, horizon_bytes: int) -> None:
        """Open or create the cache, put its account in order and take a lease.

        Args:
            folder: data.storage.cache_dir.
            limit_bytes: most that all entries may take together.
            horizon_bytes: what this process fetches ahead; never evicted while it lives.

        Raises:
            ConfigError: the limit does not hold the horizons of all processes that share the cache.
            StorageError: the folder cannot be made or belongs to somebody else.
        """
        self.folder = folder / f"dstrain-cache-v1-{os.getuid()}"
        self._limit, self._horizon = limit_bytes, horizon_bytes
        self._entries, self._leases = self.folder / "entries", self.folder / "leases"
        self._threads = threading.Lock()
        try:
            for path in (self.folder, self._entries, self._leases):
                _private_directory(path)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock_file = os.open(self.folder / "lock", flags, 0o600)
            with self._locked() as mine:
                if not mine:
                    raise StorageError(
                        f"{self.folder}: another process holds the cache's lock for {LOCK_PATIENCE_S:g} s"
                    )
                self._lease = self._take_lease()
                self._write_usage(self._count(remove_leftovers=True))
        except OSError as error:
            raise self._fault(error) from error

    def get(self, key: str) -> bytes | None:
        """The bytes of an entry, or None. Their length is right, their content is for the reader to check."""
        length = int(key.rpartition("-")[2], 16)
        try:
            handle = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with open(handle, "rb") as file:
            data = file.read(length + 1)
            with contextlib.suppress(OSError):
                os.utime(handle)  # eviction asks when an entry was used
        if len(data) == length:
            return data
        self.drop(key)
        return None

    def path_of(self, key: str) -> Path | None:
        """The file of an entry, for mapping it; stays readable through a map when the entry is evicted."""
        path = self._path(key)
        return path if key in self else None

    def __contains__(self, key: str) -> bool:
        try:
            found = os.stat(self._path(key), follow_symlinks=False)
        except OSError:
            return False
        return found.st_size == int(key.rpartition("-")[2], 16)

    def put(self, key: str, data: bytes | memoryview) -> bool:
        """Keep an entry, evicting others where needed.

        Returns:
            Whether it is kept; False when all the room is taken by what is needed sooner.

        Raises:
            StorageError: the disk is full or failing.
        """
        size = memoryview(data).nbytes
        final = self._path(key)
        if key in self:
            return True
        temporary = final.with_name(f".tmp-{self._lease.name}-{uuid.uuid4().hex[:8]}")
        try:
            with self._locked() as mine:
                if not mine or not self._make_room(size):
                    return False
                _private_directory(final.parent)
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                os.ftruncate(handle, size)  # counted in full from now on, also by a process that counts again
                self._write_usage(self._usage() + size)
        except OSError as error:
            raise self._fault(error) from error
        return self._fill(temporary, handle, data, final)

    def drop(self, key: str) -> None:
        """Remove an entry, e.g. a damaged one."""
        path = self._path(key)
        with self._locked(), contextlib.suppress(OSError):
            size = os.stat(path, follow_symlinks=False).st_size
            path.unlink()
            self._write_usage(self._usage() - size)

    def notes(self, fingerprint: str) -> Path:
        """A private folder for small files about a dataset; not counted and never evicted."""
        folder = self.folder / "notes" / fingerprint[:32]
        try:
            for path in (folder.parent, folder):
                _private_directory(path)
        except OSError as error:
            raise self._fault(error) from error
        return folder

    def plan(self, keys: Mapping[str, int]) -> None:
        """Say what will be read next: key to size, soonest first. Decides what is evicted, here and by other processes."""
        self._lease.publish(keys, horizon_bytes=self._horizon)

    def used(self, keys: Sequence[str]) -> None:
        """Take what was read out of this process's plan."""
        self._lease.forget(keys)

    def close(self) -> None:
        """Give the lease back; entries stay."""
        self._lease.release()

    def __del__(self) -> None:
        handle = getattr(self, "_lock_file", None)
        if handle is not None:
            os.close(handle)

    def _fill(self, temporary: Path, handle: int, data: bytes | memoryview, final: Path) -> bool:
        failure: OSError | None = None
        kept = False
        try:
            try:
                view = memoryview(data)
                while view.nbytes:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            os.link(temporary, final)
            kept = True
        except FileExistsError:
            pass  # another process was quicker with the same bytes
        except OSError as error:
            failure = error
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not kept:
            with self._locked():
                self._write_usage(self._usage() - memoryview(data).nbytes)
        if failure is not None:
            raise self._fault(failure) from failure
        return True

    def _make_room(self, size: int) -> bool:
        need = self._usage() + size - self._limit
        if need <= 0:
            return True
        freed = 0
        protected, next_use = protected_and_next_use(self._leases, own=self._lease)
        entries = [entry for entry in self._list() if entry[0] not in protected]
        # What nobody plans to read goes first, and of that what was used last: training comes back to a block once an
        # epoch, so what has not been used for long is the next to be used. Then what is needed last (Belady's rule).
        entries.sort(key=lambda entry: (next_use.get(entry[0], 1 << 62), entry[2]), reverse=True)
        for key, length, _ in entries:
            if freed >= need and (key in next_use or freed >= self._limit // _BATCH_SHARE):
                break
            with contextlib.suppress(OSError):
                self._path(key).unlink()
                freed += length
        self._write_usage(self._usage() - freed)
        return freed >= need

    def _list(self) -> list[tuple[str, int, float]]:
        """Key, size and time of last use of every entry."""
        found = []
        for folder in os.scandir(self._entries):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder.path):
                    if _KEY.fullmatch(entry.name):
                        with contextlib.suppress(OSError):
                            info = entry.stat(follow_symlinks=False)
                            found.append((entry.name, info.st_size, info.st_mtime))
        return found

    def _count(self, *, remove_leftovers: bool) -> int:
        """Bytes on disk, entries being written included; removes what killed processes left."""
        alive = {lease for lease, _ in live_leases(self._leases)} | {self._lease.name}
        total = sum(size for _, size, _ in self._list())
        for path in self._entries.glob("*/.tmp-*"):
            with contextlib.suppress(OSError):
                if path.name.split("-")[1] in alive or not remove_leftovers:
                    total += path.stat().st_size
                else:
                    path.unlink()
        return total

    def _take_lease(self) -> Lease:
        others = [plan.horizon_bytes for _, plan in live_leases(self._leases)]
        total = sum(others) + self._horizon
        if total > self._limit:
            raise ConfigError(
                f"data.storage.cache_limit_bytes: {self._limit} is less than the {total} bytes that the "
                f"{len(others) + 1} processes of this node fetch ahead ({self.folder}): raise it, or lower prefetch_bytes"
            )
        return Lease(self._leases, horizon_bytes=self._horizon)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no cache key")
        return self._entries / key[:2] / key

    def _usage(self) -> int:
        try:
            return int((self.folder / "usage").read_text())
        except (OSError, ValueError):
            return self._count(remove_leftovers=False)

    def _write_usage(self, total: int) -> None:
        # A few bytes in place under the lock; a kill in between is put right when the next process opens the cache.
        (self.folder / "usage").write_text(f"{max(0, total)}\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """The cache's lock for this thread; yields False when it could not be had in time."""
        with self._threads:
            mine = _try_lock(self._lock_file)
            try:
                yield mine
            finally:
                if mine:
                    fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _fault(self, error: OSError) -> StorageError:
        reasons = {
            errno.ENOSPC: "the disk is full: free some space or lower data.storage.cache_limit_bytes",
            errno.EDQUOT: "your quota is used up: free some space or lower data.storage.cache_limit_bytes",
            errno.EROFS: "the file system is read-only: choose another data.storage.cache_dir",
            errno.EACCES: "permission denied: choose another data.storage.cache_dir",
        }
        return StorageError(f"{self.folder}: the cache cannot be used: {reasons.get(error.errno or 0, str(error))}")


def _try_lock(handle: int) -> bool:
    end = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.002)


def _private_directory(path: Path) -> None:
    """Make a directory that only this user enters, or check that it is one."""
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    found = os.stat(path, follow_symlinks=False)
    if not os.path.isdir(path) or os.path.islink(path) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(
            f"{path}: refused as a cache: it must be a real folder of yours that nobody else may enter (mode 0700). "
            "Remove it or choose another data.storage.cache_dir"
        )
