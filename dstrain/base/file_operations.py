"""The few system calls that change what is on disk, behind one object that tests replace by a failing or crashing one.

Each method is one call, raises plain OSError and knows nothing of protocols: order, names, retries and messages are
`base.storage`'s. Exactly one object is in force in a process, for all its threads (a checkpoint is written by a thread
behind the training): what a test puts in force is met by every save, whoever runs it. Looking (stat, listing, reading
what a manifest vouches for) does not go through here: it cannot damage anything.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)


class FileOperations:
    """The operating system itself. A handle is a file descriptor."""

    def create(self, path: Path) -> int:
        """Open a new file for writing; it must not exist, and a link in its place is not followed."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_append(self, path: Path) -> int:
        """Open a file, made when missing, for writing at its end."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def open_read(self, path: Path) -> int:
        """Open a file for reading, to copy it."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, handle: int, buffer: memoryview) -> int:
        """Fill a buffer from a file as far as one call goes; 0 at the end of the file."""
        return os.readv(handle, [buffer])

    def write(self, handle: int, data: memoryview) -> int:
        """Write as much as one call takes and return how many bytes that were: it may be fewer than given."""
        return os.write(handle, data)

    def size(self, handle: int) -> int:
        """Length of an open file in bytes, as the file system has it."""
        return os.fstat(handle).st_size

    def fsync(self, handle: int) -> None:
        """Make a file's content and length durable. After a failure the handle is lost: see `storage.NewFile`."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Let go of a handle; some network file systems tell a write error only here."""
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Move a name in one step, over a file or an empty folder that has the target's name."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, which must be free."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """Make one folder, whose parent exists."""
        os.mkdir(path)

    def remove_directory(self, path: Path) -> None:
        """Remove one empty folder."""
        os.rmdir(path)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a folder durable; nothing to do where the file system has no such call (some FUSE mounts)."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
        finally:
            os.close(handle)


_in_force = [FileOperations()]


def operations() -> FileOperations:
    """The object in force."""
    return _in_force[-1]


@contextmanager
def operations_replaced(replacement: FileOperations) -> Iterator[FileOperations]:
    """For tests: put another object in force, for every thread of the process, until the block ends."""
    _in_force.append(replacement)
    try:
        yield replacement
    finally:
        _in_force.remove(replacement)
