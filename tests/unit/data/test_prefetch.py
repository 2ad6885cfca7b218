import dataclasses
import threading
import time
from itertools import islice
from random import Random

import pytest
import torch

from dstrain.base.errors import DataError
from dstrain.base.protocols import MicroBatch, StepData
from dstrain.data.prefetch import Prefetcher


class Steps:
    """A loader whose data is its step; notes what was made and can fail."""

    steps_per_epoch = 1.0

    def __init__(self, *, fail_at=None, delay=lambda step: 0):
        self.fail_at, self.delay, self.made = fail_at, delay, []

    def step(self, step):
        if step == self.fail_at:
            raise DataError(f"step {step} is damaged")
        self.made.append((step, threading.current_thread() is threading.main_thread()))
        time.sleep(self.delay(step))
        return StepData((), num_rows=0, padded_tokens=0, ledger=step, epoch=0.0)


depths = pytest.mark.parametrize("depth", [0, 1, 4, 64])


@depths
@pytest.mark.parametrize(("first", "last"), [(0, 10), (7, 20), (3, 4)])
def test_steps_come_in_order_each_once(depth, first, last):
    loader = Steps()
    with Prefetcher(loader, first_step=first, last_step=last, depth=depth) as steps:
        assert [(step, data.ledger) for step, data in steps] == [(step, step) for step in range(first, last)]
    assert [step for step, _ in loader.made] == list(range(first, last))


@depths
def test_no_steps_to_make_is_no_thread_and_no_wait(depth):
    with Prefetcher(Steps(), first_step=5, last_step=5, depth=depth) as steps:
        assert list(steps) == []


def test_depth_decides_who_makes_the_steps():
    here, ahead = Steps(), Steps()
    for loader, depth in ((here, 0), (ahead, 2)):
        with Prefetcher(loader, first_step=0, last_step=3, depth=depth) as steps:
            list(steps)
    assert all(in_main for _, in_main in here.made)
    assert not any(in_main for _, in_main in ahead.made)


def test_without_depth_a_step_is_made_only_when_asked_for():
    loader = Steps()
    with Prefetcher(loader, first_step=0, last_step=9, depth=0) as steps:
        assert len(list(islice(steps, 2))) == 2
    assert len(loader.made) == 2


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_steps_are_made_ahead_than_allowed(depth):
    loader = Steps()
    with Prefetcher(loader, first_step=0, last_step=1000, depth=depth) as steps:
        taken = len(list(islice(steps, 3)))
    assert taken <= len(loader.made) <= taken + depth


@depths
def test_a_fault_comes_after_the_steps_before_it_and_stays(depth):
    with Prefetcher(Steps(fail_at=3), first_step=0, last_step=10, depth=depth) as steps:
        items = iter(steps)
        assert [step for step, _ in islice(items, 3)] == [0, 1, 2]
        with pytest.raises(DataError, match="step 3 is damaged"):
            next(items)
        with pytest.raises(DataError, match="step 3 is damaged"):
            next(iter(steps))


@pytest.mark.parametrize("depth", [1, 4])
def test_leaving_early_stops_the_thread_even_when_the_queue_is_full(depth):
    loader = Steps()
    with Prefetcher(loader, first_step=0, last_step=10**9, depth=depth) as steps:
        next(iter(steps))
        deadline = time.monotonic() + 30
        while len(loader.made) < 1 + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(loader.made) == 1 + depth
        assert _threads()
    assert not _threads()


def test_a_fault_in_the_loop_stops_the_thread():
    def loop():
        with Prefetcher(Steps(), first_step=0, last_step=10**9, depth=2) as steps:
            for step, _ in steps:
                1 // (2 - step)

    with pytest.raises(ZeroDivisionError):
        loop()
    assert not _threads()


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("dstrain-prefetch")]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("depth", [1, 3, 64])
def test_threads_and_delays_never_change_the_order(threads, depth):
    delays = Random(threads * 100 + depth)
    loader = Steps(delay=lambda _: delays.random() * 0.003)
    with Prefetcher(loader, first_step=3, last_step=60, depth=depth, threads=threads) as steps:
        assert [(step, data.ledger) for step, data in steps] == [(step, step) for step in range(3, 60)]
    assert sorted(step for step, _ in loader.made) == list(range(3, 60))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_fault_comes_in_its_place_with_any_number_of_threads(threads):
    loader = Steps(fail_at=9, delay=lambda step: 0.002 * (step % 3))
    taken = []
    with Prefetcher(loader, first_step=0, last_step=100, depth=16, threads=threads) as steps:
        with pytest.raises(DataError, match="step 9 is damaged"):
            taken += [step for step, _ in steps]
    assert max(step for step, _ in loader.made) < 9 + 16


class Heavy(Steps):
    """Steps of 8000 bytes and a few more."""

    def step(self, step):
        data = super().step(step)
        tokens = torch.zeros(1000, dtype=torch.int64)
        batch = MicroBatch(tokens, tokens[:0], (1000,), tokens[:0], tokens[:0])
        return dataclasses.replace(data, micro_batches=[batch])


def test_what_is_made_ahead_is_bounded_in_bytes_and_never_stands_still():
    loader = Heavy()
    with Prefetcher(loader, first_step=0, last_step=50, depth=32, limit_bytes=20_000) as steps:
        for step, _ in steps:
            time.sleep(0.002)
            assert len(loader.made) <= step + 1 + 3 + 1  # three are more than 20 kB; one may be in the making
    tiny = Heavy()
    with Prefetcher(tiny, first_step=0, last_step=5, depth=4, limit_bytes=1) as steps:
        assert len(list(steps)) == 5
