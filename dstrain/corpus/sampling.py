"""Samples of a corpus by document hash: the same texts whatever the order of files or the number of copies.

A text's place is a hash of the text alone, so a sample of more bytes contains every sample of fewer, and adding a file
to the corpus moves the sample only by the file's own share. Memory is the sample.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator


def text_places(data: bytes) -> tuple[int, int]:
    """Two independent 64-bit hashes of a text in UTF-8: its place in the order of samples, and in that of held-out ones."""
    # A person of its own: what is sampled must not follow what the shard builder holds out.
    digest = hashlib.blake2b(data, digest_size=16, person=b"dstrain-sample").digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


class HashSample:
    """The texts with the least places, as many as reach `limit_bytes`; each text once.

    Attributes:
        size_bytes: UTF-8 bytes held.
    """

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._texts: dict[int, bytes] = {}
        self._largest_first: list[int] = []
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, data: bytes, place: int) -> None:
        """Offer one text in UTF-8 with its place; what the limit no longer needs is let go."""
        if place in self._texts or (self.size_bytes >= self._limit and place > -self._largest_first[0]):
            return
        self._texts[place] = data
        heapq.heappush(self._largest_first, -place)
        self.size_bytes += len(data)
        # The least texts that reach the limit stay; dropping one more would fall below it.
        while self.size_bytes - len(self._texts[-self._largest_first[0]]) >= self._limit:
            self.size_bytes -= len(self._texts.pop(-heapq.heappop(self._largest_first)))

    def texts(self) -> Iterator[str]:
        """The sample in the order of places."""
        for place in sorted(self._texts):
            yield self._texts[place].decode("utf-8")
