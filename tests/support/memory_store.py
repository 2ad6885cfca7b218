"""A byte store in memory that counts its reads, can be slow and can fail: the origin in tests of what stands before it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from dstrain.base.errors import DataError


class MemoryStore:
    """Files as a dictionary. `before_read(name, offset, length)` may sleep or raise."""

    name = "memory"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.reads: list[tuple[str, int, int]] = []
        self.before_read: Callable[[str, int, int], None] = lambda *_: None
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    @property
    def identities(self) -> dict[str, str]:
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    @property
    def bytes_read(self) -> int:
        return sum(length for _, _, length in self.reads)

    def read(self, name, offset, length):
        with self.lock:
            self.reads.append((name, offset, length))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.before_read(name, offset, length)
        finally:
            with self.lock:
                self.running -= 1
        data = self.files[name][offset : offset + length]
        if len(data) != length:
            raise DataError(f"{name}: cut")
        return data

    read_again = read

    def size(self, name):
        return len(self.files[name])

    def will_need(self, extents):
        pass

    def close(self):
        pass
