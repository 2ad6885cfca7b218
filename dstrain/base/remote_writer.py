"""The one door for writing to remote stores: put a file, list a folder's names, remove a file. One try each, with a time limit.

An object store shows an object whole or not at all, so an object that others trust (a manifest) is put last. Reading, faults and
secrets are `base.remote`'s. HTTP servers and the Hub are not written to.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from dstrain.base.errors import ConfigError, DataError
from dstrain.base.locations import RemoteUrl
from dstrain.base.protocols import ShouldLeave, never
from dstrain.base.remote import RemoteFolder

WRITABLE_SCHEMES = ("s3", "gs", "gcs", "az", "abfs")


class RemoteWriter(RemoteFolder):
    """A folder in an object store that can be written."""

    def __init__(self, url: RemoteUrl, *, connect_timeout_s: float = 20, should_leave: ShouldLeave = never) -> None:
        """Make a client; nothing is asked of the store yet.

        Args:
            url: the folder.
            connect_timeout_s: until a connection must stand, in seconds.
            should_leave: as for `RemoteFolder`.

        Raises:
            ConfigError: this kind of store cannot be written, or its package is not installed.
        """
        if url.scheme not in WRITABLE_SCHEMES:
            raise ConfigError(f"{url}: {url.scheme}:// cannot be written: use s3://, gs://, az:// or abfs://")
        super().__init__(url, connect_timeout_s=connect_timeout_s, should_leave=should_leave)

    def inside(self, name: str) -> RemoteWriter:
        """A folder of this one, over the same client."""
        inner = copy.copy(self)
        inner.url = self.url.child(name)
        return inner

    def put(self, name: str, source: Path, *, timeout_s: float) -> None:
        """Copy a local file into the folder, over what has the name.

        Raises:
            TransientRemoteError: worth another try.
            DataError: the store refuses.
        """
        self._run(name, timeout_s, self._operation("put_file"), str(source), self._path(name))

    def put_bytes(self, name: str, data: bytes, *, timeout_s: float) -> None:
        """Write a small object in one piece, over what has the name.

        Raises:
            TransientRemoteError: worth another try.
            DataError: the store refuses.
        """
        self._run(name, timeout_s, self._operation("pipe_file"), self._path(name), data)

    def names(self, *, timeout_s: float) -> list[str]:
        """Names directly inside the folder, files' and folders', sorted; empty when there is no such folder.

        Raises:
            TransientRemoteError: worth another try.
            DataError: the store refuses.
        """
        path = self._files._strip_protocol(self.url.text()).rstrip("/")
        try:
            found = self._run("", timeout_s, self._list, path)
        except DataError as error:
            if is_missing(error):
                return []
            raise
        inside = {str(entry).rstrip("/").rpartition("/")[2] for entry in found if str(entry).rstrip("/") != path}
        return sorted(inside)

    def remove(self, name: str, *, timeout_s: float) -> None:
        """Remove a file; a missing one is no fault.

        Raises:
            TransientRemoteError: worth another try.
            DataError: the store refuses.
        """
        try:
            self._run(name, timeout_s, self._operation("rm_file"), self._path(name))
        except DataError as error:
            if not is_missing(error):
                raise

    def _path(self, name: str) -> str:
        return str(self._files._strip_protocol(self.url.file(name)))

    def _operation(self, name: str) -> Any:
        """The client's coroutine where it has coroutines, else its blocking method."""
        return getattr(self._files, f"_{name}" if getattr(self._files, "async_impl", False) else name)

    def _list(self, path: str) -> Any:
        return self._operation("ls")(path, detail=False)


def is_missing(error: DataError) -> bool:
    """Whether the store said that there is no such file, rather than refused access."""
    return isinstance(error.__context__, FileNotFoundError)
