"""Reads ahead of need from a remote store, and keeps what was read in the node's cache.

`will_need` gives the order; daemon threads fetch neighbours in one request, soonest first, with at most `prefetch_bytes`
fetched or being fetched and not yet read. A read that nothing was fetched for goes to the store at once, so a wrong hint costs
time and never blocks. What is delivered depends on name, offset and length alone. Verifies nothing but lengths.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

from dstrain.base.errors import DataError, StorageError
from dstrain.data.cache import DiskCache, cache_key
from dstrain.data.ranges import Request, coalesce, windows
from dstrain.data.stores import ByteStore, Extent, StorageConfig

SMALL_BYTES = 8 << 10
"""Shorter extents (document ends) are not worth a file in the cache."""


class _Fetch:
    """One request on its way; all its parts point here."""

    def __init__(self) -> None:
        self.failure: Exception | None = None


class CachedStore:
    """A `ByteStore` in front of a slow one. Threads start with the first `will_need` that asks for anything."""

    def __init__(
        self, store: ByteStore, config: StorageConfig, *, identities: Mapping[str, str], cache: DiskCache | None
    ) -> None:
        """Wrap a store.

        Args:
            store: where bytes come from; safe from any thread.
            config: how much and how far ahead.
            identities: SHA-256 of each file; files without one are not cached.
            cache: the node's cache, if there is one.
        """
        self._store, self._config, self._identities, self._cache = store, config, identities, cache
        self._change = threading.Condition()
        self._queue: deque[Request] = deque()
        self._wanted: dict[Extent, None] = {}
        self._told: frozenset[Extent] = frozenset()
        self._read: set[Extent] = set()  # of those told; the reader has them, and they are not fetched ahead once more
        self._held: dict[Extent, bytes | None] = {}  # fetched and not yet read; None: in the cache on disk
        self._busy: dict[Extent, _Fetch] = {}
        self._ahead = 0  # bytes of held and busy
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def name(self) -> str:
        """The store's name."""
        return self._store.name

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes; see `ByteStore.read`."""
        extent = Extent(name, offset, length)
        data = self._take(extent)
        with self._change:
            if extent in self._told:
                self._read.add(extent)
        if data is not None:
            return data
        key = self._key(extent)
        if self._cache is not None and key is not None:
            data = self._cache.get(key)
            if data is None:
                data = self._store.read(name, offset, length)
                self._cache.put(key, data)
            self._cache.used([key])
            return data
        return self._store.read(name, offset, length)

    def read_again(self, name: str, offset: int, length: int) -> bytes:
        """From the origin; what was kept of these bytes is dropped."""
        extent = Extent(name, offset, length)
        with self._change:
            self._drop_held(extent)
        key = self._key(extent)
        if self._cache is not None and key is not None:
            self._cache.drop(key)
        return self._store.read_again(name, offset, length)

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return self._store.size(name)

    def will_need(self, extents: Sequence[Extent]) -> None:
        """What will be read next, soonest first; replaces what was said before.

        What was told before, was read and is told again is taken to be still in the reader's hands: a block serves many
        steps. It is not fetched ahead, only when it is read after all.
        """
        with self._change:
            told = frozenset(extents)
            self._read &= told
            self._told = told
            wanted = dict.fromkeys(extent for extent in extents if extent not in self._read)
            if list(self._wanted) == list(wanted):
                return
            for extent in [extent for extent in self._held if extent not in wanted]:
                self._drop_held(extent)
            self._wanted = wanted
            todo = [extent for extent in wanted if extent not in self._held and extent not in self._busy]
            half = max(1, self._config.prefetch_bytes // 2)
            self._queue = deque(
                request
                for run in windows(todo, window_bytes=half)
                for request in coalesce(
                    run, range_bytes=min(self._config.range_bytes, half), gap_bytes=self._config.gap_bytes
                )
            )
            self._start_threads()
            self._change.notify_all()
        if self._cache is not None:
            keys = {key: extent.length for extent in wanted if (key := self._key(extent)) is not None}
            self._cache.plan(keys)

    def close(self) -> None:
        """End the threads; a request on its way is left to end by itself."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        self._store.close()
        if self._cache is not None:
            self._cache.close()

    def _take(self, extent: Extent) -> bytes | None:
        """What was fetched ahead, or None: it is on disk, or must be fetched now."""
        while True:
            mine = _Fetch()
            with self._change:
                if extent in self._held:
                    self._wanted.pop(extent, None)
                    return self._drop_held(extent)
                fetch = self._busy.get(extent)
                if fetch is None:
                    parts = self._promote(extent, mine)
                    self._wanted.pop(extent, None)
                    if not parts:
                        return None
                else:
                    self._wanted.pop(extent, None)
                    self._await(extent, fetch)
                    continue
            self._run(parts, mine)
            if mine.failure is not None:
                raise mine.failure

    def _await(self, extent: Extent, fetch: _Fetch) -> None:
        while self._busy.get(extent) is fetch and not self._closed:
            self._change.wait(1)
        if fetch.failure is not None:
            raise fetch.failure
        if self._closed:
            raise StorageError(f"{self.name}: closed while reading")

    def _promote(self, extent: Extent, fetch: _Fetch) -> list[Extent]:
        """The request in the queue that brings `extent` and neighbours, for its reader to make now, if there is room."""
        request = next((request for request in self._queue if extent in request.parts), None)
        if request is None or self._ahead + request.whole.length > self._config.prefetch_bytes:
            return []
        self._queue.remove(request)
        return self._start(request, fetch)

    def _drop_held(self, extent: Extent) -> bytes | None:
        if extent not in self._held:
            return None
        self._ahead -= extent.length
        self._change.notify_all()
        return self._held.pop(extent)

    def _start_threads(self) -> None:
        while len(self._threads) < min(self._config.connections, len(self._queue)):
            # Daemons: a stalled request must not keep a process from leaving.
            thread = threading.Thread(target=self._work, name=f"dstrain-fetch-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            fetch = _Fetch()
            with self._change:
                parts = self._next_parts(fetch)
                while not parts:
                    if self._closed:
                        return
                    self._change.wait()
                    parts = self._next_parts(fetch)
            self._run(parts, fetch)

    def _run(self, parts: Sequence[Extent], fetch: _Fetch) -> None:
        """Make a request and hold what it brings."""
        fetched: dict[Extent, bytes | None] = {}
        try:
            fetched = self._fetch(parts)
        except Exception as failure:  # noqa: BLE001  (carried to whoever reads these bytes)
            fetch.failure = failure
        with self._change:
            for part in parts:
                del self._busy[part]
                if part in fetched:
                    # Also when it is in the plan no more: a reader may be waiting for it; the next plan drops it.
                    self._held[part] = fetched[part]
                else:
                    self._ahead -= part.length
            self._change.notify_all()

    def _next_parts(self, fetch: _Fetch) -> list[Extent]:
        """The parts of the next request that are still wanted, marked as on their way; empty when there is none now."""
        while self._queue:
            size = sum(part.length for part in self._missing(self._queue[0]))
            if size and self._ahead and self._ahead + size > self._config.prefetch_bytes:
                return []
            if parts := self._start(self._queue.popleft(), fetch):
                return parts
        return []

    def _start(self, request: Request, fetch: _Fetch) -> list[Extent]:
        parts = self._missing(request)
        self._busy.update(dict.fromkeys(parts, fetch))
        self._ahead += sum(part.length for part in parts)
        return parts

    def _missing(self, request: Request) -> list[Extent]:
        return [
            part for part in request.parts if part in self._wanted and part not in self._held and part not in self._busy
        ]

    def _fetch(self, parts: Sequence[Extent]) -> dict[Extent, bytes | None]:
        """Bytes of each part, or None for those that now lie in the cache."""
        found: dict[Extent, bytes | None] = {}
        for part in parts:
            key = self._key(part)
            if self._cache is not None and key is not None and key in self._cache:
                found[part] = None
        missing = [part for part in parts if part not in found]
        for request in coalesce(missing, range_bytes=1 << 62, gap_bytes=self._config.gap_bytes):
            whole = self._store.read(*request.whole)
            for part in request.parts:
                begin = part.offset - request.whole.offset
                data = whole[begin : begin + part.length]
                if len(data) != part.length:
                    raise DataError(f"{self.name}/{part.name}: {len(whole)} bytes instead of {request.whole.length}")
                key = self._key(part)
                kept = self._cache is not None and key is not None and self._cache.put(key, data)
                found[part] = None if kept else data
        return found

    def _key(self, extent: Extent) -> str | None:
        identity = self._identities.get(extent.name)
        if identity is None or extent.length < SMALL_BYTES:
            return None
        return cache_key(identity, extent.offset, extent.length)
