"""Blocks read and tokenised ahead by spawned processes, so that on-the-fly text keeps up with training.

The plan says which blocks come next; at most a few per process are under way or waiting, so memory stays bounded. What
is asked for and not there yet, or after a worker was lost, is read by the caller itself: results never depend on this.
Workers leave when their parent dies.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dstrain.base.logs import get_logger
from dstrain.data.blocks import Block
from dstrain.foreign.block_reader import BlockReader
from dstrain.foreign.pool import start_pool

_LOG = get_logger(__name__)
BLOCKS_PER_WORKER = 4


class _Worker:
    """What a spawned process keeps between blocks; set once when it starts."""

    reader: BlockReader


def _start(path: Path) -> None:
    _Worker.reader = BlockReader(path, check_shards=False)


def _read(block: int) -> Block:
    return _Worker.reader.read(block)


class ReadAhead:
    """A bounded set of blocks under way in other processes."""

    def __init__(self, path: Path, *, workers: int) -> None:
        """Get ready; processes start with the first block.

        Args:
            path: the split's folder.
            workers: processes, at least 1.
        """
        self._pool = start_pool(workers, _start, path)
        self._limit = BLOCKS_PER_WORKER * workers
        self._wanted: deque[int] = deque()
        self._named: set[int] = set()
        self._taken: set[int] = set()
        self._under_way: OrderedDict[int, Future[Block]] = OrderedDict()
        self._lock = threading.Lock()
        self._is_broken = False

    def want(self, blocks: Sequence[int]) -> None:
        """The blocks to make next, soonest first; replaces what was wanted before."""
        with self._lock:
            self._named = set(blocks)
            # What was taken and is still named is in the caller's cache: making it again would be for nothing.
            self._taken &= self._named
            for block in [block for block in self._under_way if block not in self._named]:
                self._under_way.pop(block).cancel()
            done = {*self._under_way, *self._taken}
            self._wanted = deque(block for block in dict.fromkeys(blocks) if block not in done)
            self._submit()

    def take(self, block: int) -> Block | None:
        """A block that was wanted, waiting for it if it is under way; None means: read it yourself.

        Raises:
            DataError: what reading it raised in the worker.
        """
        with self._lock:
            future = self._under_way.pop(block, None)
            if block in self._named:
                self._taken.add(block)
            if future is None and block in self._wanted:
                self._wanted.remove(block)
            self._submit()
        if future is None:
            return None
        try:
            return future.result()
        except CancelledError:
            return None
        except BrokenProcessPool:
            self._give_up()
            return None

    def close(self) -> None:
        """Stop the processes and wait until they are gone."""
        with self._lock:
            self._is_broken = True
            self._wanted, self._under_way = deque(), OrderedDict()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        while self._wanted and len(self._under_way) < self._limit and not self._is_broken:
            block = self._wanted.popleft()
            try:
                self._under_way[block] = self._pool.submit(_read, block)
            except (BrokenProcessPool, RuntimeError):
                self._is_broken = True

    def _give_up(self) -> None:
        with self._lock:
            if not self._is_broken:
                _LOG.warning("a tokenising process was lost (mostly for want of memory): going on without them")
            self._is_broken = True
            self._wanted, self._under_way = deque(), OrderedDict()
