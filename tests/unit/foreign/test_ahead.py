from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dstrain.foreign import ahead as ahead_module
from dstrain.foreign.ahead import BLOCKS_PER_WORKER, ReadAhead


class Pool:
    """Keeps what was asked for; nothing is done before `finish`."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.futures: dict[int, Future[Any]] = {}

    def submit(self, _function: Any, block: int) -> Future[Any]:
        self.asked.append(block)
        self.futures[block] = Future()
        return self.futures[block]

    def finish(self, block: int) -> None:
        self.futures[block].set_result(f"block {block}")

    def shutdown(self, **_options: bool) -> None:
        pass


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(ahead_module, "start_pool", lambda *_arguments: made)
    return made


def test_a_bounded_number_of_blocks_is_under_way_soonest_first(pool: Pool) -> None:
    ahead = ReadAhead(Path("x"), workers=1)
    ahead.want(range(20))
    assert pool.asked == list(range(BLOCKS_PER_WORKER))
    pool.finish(0)
    assert ahead.take(0) == "block 0"
    assert pool.asked[-1] == BLOCKS_PER_WORKER


def test_what_was_taken_is_not_made_again_while_it_is_named(pool: Pool) -> None:
    ahead = ReadAhead(Path("x"), workers=1)
    ahead.want([7, 8])
    pool.finish(7)
    ahead.take(7)
    ahead.want([7, 8, 9])
    assert pool.asked == [7, 8, 9]
    ahead.want([9])
    ahead.want([7])
    assert pool.asked == [7, 8, 9, 7]


def test_what_was_read_before_anything_was_named_is_made_when_it_is(pool: Pool) -> None:
    ahead = ReadAhead(Path("x"), workers=1)
    assert ahead.take(3) is None
    ahead.want([3])
    assert pool.asked == [3]


def test_what_is_no_longer_wanted_makes_room(pool: Pool) -> None:
    ahead = ReadAhead(Path("x"), workers=1)
    ahead.want(range(20))
    ahead.want([50, 51])
    assert pool.asked[BLOCKS_PER_WORKER:] == [50, 51]
    assert pool.futures[0].cancelled()
    assert ahead.take(0) is None


def test_a_lost_worker_leaves_the_reading_to_the_caller(pool: Pool) -> None:
    ahead = ReadAhead(Path("x"), workers=1)
    ahead.want([1, 2])
    pool.futures[1].set_exception(ahead_module.BrokenProcessPool())
    assert ahead.take(1) is None
    ahead.want([5])
    assert ahead.take(5) is None
    assert 5 not in pool.asked
