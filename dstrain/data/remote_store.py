"""Reads of a remote folder that either succeed or fail clearly within a deadline: retries with backoff and full jitter.

A read that waits is left when the run is asked to stop. Every reply is checked by `base.remote` to be exactly the bytes
that were asked for. The jitter comes from a generator of its own and decides only when a try is made. Caches nothing and
reads nothing ahead.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from dstrain.base.errors import StorageError
from dstrain.base.locations import RemoteUrl
from dstrain.base.logs import get_logger
from dstrain.base.protocols import Interrupted, ShouldLeave, never
from dstrain.base.remote import LOOK_S, RemoteFolder, TransientRemoteError
from dstrain.data.stores import Extent, StorageConfig

FIRST_WAIT_S = 0.2
"""Longest wait before the second try, in seconds; doubles with every try."""
LONGEST_WAIT_S = 20.0

_Result = TypeVar("_Result")
_LOG = get_logger(__name__)


class RemoteStore:
    """A `ByteStore` over a remote folder.

    Attributes:
        bytes_read: payload bytes received so far.
        requests: tries made so far.
    """

    def __init__(
        self, url: RemoteUrl, config: StorageConfig, *, folder: RemoteFolder | None = None, should_leave: ShouldLeave = never
    ) -> None:  # fmt: skip
        """Make the client; nothing is asked of the store yet.

        Args:
            url: the folder.
            config: time limits and credentials.
            folder: what makes one try; by default `base.remote.RemoteFolder`.
            should_leave: asked while a read waits, in a try or between two: whether to raise `Interrupted` instead.

        Raises:
            ConfigError: the package for this kind of store is not installed.
        """
        self._config, self._url, self._should_leave = config, url, should_leave
        self._folder = folder or RemoteFolder(
            url, connect_timeout_s=config.connect_timeout_s, anonymous=config.anonymous, should_leave=should_leave
        )
        self._jitter = random.Random()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.requests = 0

    @property
    def name(self) -> str:
        """The URL without secrets."""
        return self._url.clean

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes; see `ByteStore.read`."""
        data = self._insist(name, lambda limit: self._folder.read_range(name, offset, length, timeout_s=limit))
        with self._lock:
            self.bytes_read += length
        return data

    def read_again(self, name: str, offset: int, length: int) -> bytes:
        """The same: nothing is kept here."""
        return self.read(name, offset, length)

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return self._insist(name, lambda limit: self._folder.size(name, timeout_s=limit))

    def will_need(self, extents: Sequence[Extent]) -> None:
        """Nothing: `data.cached_store` reads ahead."""

    def close(self) -> None:
        """Close the connections and give up waits."""
        self._closed.set()
        self._folder.close()

    def _insist(self, name: str, attempt: Callable[[float], _Result]) -> _Result:
        begin = time.monotonic()
        end = begin + self._config.deadline_s
        tries = 0
        while True:
            tries += 1
            with self._lock:
                self.requests += 1
            try:
                return attempt(max(0.01, min(self._config.request_timeout_s, end - time.monotonic())))
            except TransientRemoteError as error:
                told = str(error)
            wait = self._jitter.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries - 1, 16)))
            left = end - time.monotonic()
            if wait >= left or self._is_closed_within(wait):
                raise StorageError(
                    f"{self.name}/{name}: not readable: {tries} tries in {time.monotonic() - begin:.1f} s failed, the last "
                    f"with: {told}. Is the store reachable from this node? (data.storage.deadline_s is "
                    f"{self._config.deadline_s:g})"
                ) from None
            _LOG.debug("%s/%s: try %d failed: %s", self.name, name, tries, told)

    def _is_closed_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._should_leave():
            left = end - time.monotonic()
            if self._closed.wait(max(0.0, min(LOOK_S, left))):
                return True
            if left <= LOOK_S:
                return False
        raise Interrupted(f"asked to stop while waiting for {self.name}")
