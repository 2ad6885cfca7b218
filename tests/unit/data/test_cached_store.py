"""P4, P16: what is delivered never depends on hints, timing, faults or the cache; memory ahead is bounded."""

from __future__ import annotations

import random
import threading
import time

import pytest

from dstrain.base.errors import StorageError
from dstrain.data import cached_store
from dstrain.data.cache import DiskCache
from dstrain.data.cached_store import CachedStore
from dstrain.data.stores import Extent, StorageConfig
from tests.support.memory_store import MemoryStore

SIZE = 10_000
FILES = {name: random.Random(name).randbytes(20 * SIZE) for name in ("a.tar", "b.tar")}
EXTENTS = [Extent(name, k * SIZE, SIZE - 16) for k in range(20) for name in FILES]


def content(extent: Extent) -> bytes:
    return FILES[extent.name][extent.offset : extent.offset + extent.length]


def make(origin: MemoryStore, tmp_path=None, *, limit: int = 1 << 20, **settings) -> CachedStore:
    config = StorageConfig(**{"prefetch_bytes": 5 * SIZE, "range_bytes": 3 * SIZE, "connections": 4, **settings})
    cache = DiskCache(tmp_path, limit_bytes=limit, horizon_bytes=config.prefetch_bytes) if tmp_path else None
    return CachedStore(origin, config, identities=origin.identities, cache=cache)


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("order", ["as told", "backwards", "twice", "something else"])
def test_delivery_does_not_depend_on_hints_or_delays(tmp_path, cached, order):
    origin = MemoryStore(FILES)
    jitter = random.Random(1)
    origin.before_read = lambda *_: time.sleep(jitter.random() / 500)
    store = make(origin, tmp_path if cached else None)
    told = random.Random(2).sample(EXTENTS, len(EXTENTS))
    store.will_need(told)
    read = {"as told": told, "backwards": told[::-1], "twice": told + told, "something else": EXTENTS}[order]
    assert [store.read(*extent) for extent in read] == [content(extent) for extent in read]
    store.close()


def test_what_is_ahead_is_fetched_in_merged_requests_within_the_horizon():
    origin = MemoryStore(FILES)
    store = make(origin)
    told = [extent for extent in EXTENTS if extent.name == "a.tar"]
    store.will_need(told)
    wait_for(lambda: len(store._held) >= 4)
    time.sleep(0.05)  # nothing more may come: the room is taken
    assert sum(extent.length for extent in store._held) <= 5 * SIZE
    assert all(length > SIZE for _, _, length in origin.reads)
    for extent in told:
        assert store.read(*extent) == content(extent)
    assert len(origin.reads) <= 11  # 20 extents
    assert origin.bytes_read < 20 * SIZE
    assert (store._ahead, store._held, store._busy) == (0, {}, {})


def test_many_requests_are_in_flight_at_once():
    origin = MemoryStore(FILES)
    gate = threading.Event()
    origin.before_read = lambda *_: gate.wait(10)
    store = make(origin, prefetch_bytes=1 << 20, connections=8, range_bytes=1 << 12)
    store.will_need(EXTENTS)
    wait_for(lambda: origin.running == 8)
    gate.set()
    assert [store.read(*e) for e in EXTENTS] == [content(e) for e in EXTENTS]


def test_a_read_nothing_was_fetched_for_overtakes_the_queue():
    origin = MemoryStore(FILES)
    gate = threading.Event()
    origin.before_read = lambda name, *_: gate.wait(10) if name == "a.tar" else None
    store = make(origin, connections=1)
    store.will_need([e for e in EXTENTS if e.name == "a.tar"])
    wait_for(lambda: origin.running == 1)
    other = next(e for e in EXTENTS if e.name == "b.tar")
    assert store.read(*other) == content(other)
    gate.set()


def test_a_failed_fetch_is_told_to_its_reader_and_may_be_tried_again():
    origin = MemoryStore(FILES)
    started, gate = threading.Event(), threading.Event()

    def fail(*_):
        started.set()
        gate.wait(10)
        raise StorageError("the store is gone")

    origin.before_read = fail
    store = make(origin)
    store.will_need(EXTENTS[:1])
    started.wait(10)
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(StorageError, match="the store is gone"):
        store.read(*EXTENTS[0])
    origin.before_read = lambda *_: None
    assert store.read(*EXTENTS[0]) == content(EXTENTS[0])
    assert store._ahead == 0


def test_a_new_plan_lets_go_of_what_the_old_one_fetched():
    store = make(MemoryStore(FILES))
    store.will_need(EXTENTS[:4])
    wait_for(lambda: len(store._held) == 4)
    store.will_need(EXTENTS[8:10])
    wait_for(lambda: len(store._held) == 2)
    assert set(store._held) == set(EXTENTS[8:10])
    assert store._ahead == 2 * (SIZE - 16)


def test_the_second_epoch_and_the_second_process_download_nothing(tmp_path):
    origin = MemoryStore(FILES)
    first = make(origin, tmp_path)
    first.will_need(EXTENTS)
    assert [first.read(*e) for e in EXTENTS] == [content(e) for e in EXTENTS]
    before = origin.bytes_read
    assert before <= len(EXTENTS) * SIZE
    second = make(origin, tmp_path)
    for store in (first, second):
        store.will_need(EXTENTS[::-1])
        assert [store.read(*e) for e in EXTENTS] == [content(e) for e in EXTENTS]
        store.close()
    assert origin.bytes_read == before


def test_reading_again_goes_past_the_cache_and_drops_the_entry(tmp_path):
    origin = MemoryStore(FILES)
    store = make(origin, tmp_path)
    extent = EXTENTS[0]
    assert store.read(*extent) == content(extent)
    entry = next(path for path in tmp_path.rglob("*-*-*") if path.is_file() and path.stat().st_size == extent.length)
    entry.write_bytes(bytes(extent.length))
    assert store.read(*extent) == bytes(extent.length)  # the checksum that finds this is the reader's
    assert store.read_again(*extent) == content(extent)
    assert not entry.exists()
    assert store.read(*extent) == content(extent)


@pytest.mark.parametrize("limit", [2 * SIZE, 3 * SIZE, 7 * SIZE])
def test_a_cache_of_a_few_blocks_slows_nobody_down_for_ever(tmp_path, limit):
    """P18: eviction under a limit of two blocks never deadlocks."""
    origin = MemoryStore(FILES)
    store = make(origin, tmp_path, limit=limit, prefetch_bytes=2 * SIZE, range_bytes=SIZE)
    for seed in range(3):
        told = random.Random(seed).sample(EXTENTS, len(EXTENTS))
        store.will_need(told)
        assert [store.read(*e) for e in told] == [content(e) for e in told]
        on_disk = sum(p.stat().st_size for p in tmp_path.rglob("entries/*/*"))
        assert on_disk == store._cache._usage() <= limit
    store.close()


def test_equal_names_with_other_content_never_mix(tmp_path):
    """P18: the collision of webdataset's cache, which goes by the last part of the URL."""
    others = {name: bytes(reversed(data)) for name, data in FILES.items()}
    one, two = make(MemoryStore(FILES), tmp_path), make(MemoryStore(others), tmp_path)
    for extent in EXTENTS[:10]:
        assert one.read(*extent) == content(extent)
        assert two.read(*extent) == others[extent.name][extent.offset : extent.offset + extent.length]
        assert one.read(*extent) == content(extent)


def test_short_extents_make_no_files(tmp_path):
    store = make(MemoryStore(FILES), tmp_path)
    assert store.read("a.tar", 3, cached_store.SMALL_BYTES - 1) == FILES["a.tar"][3 : cached_store.SMALL_BYTES + 2]
    assert list(tmp_path.rglob("entries/*/*")) == []


def test_closing_ends_the_threads():
    origin = MemoryStore(FILES)
    store = make(origin)
    store.will_need(EXTENTS)
    store.close()
    for thread in store._threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("cached", [False, True])
def test_what_the_reader_has_is_not_fetched_again_when_it_is_told_again(tmp_path, cached):
    """A block serves many steps: each telling names it, and only the first read may cost a download."""
    origin = MemoryStore(FILES)
    store = make(origin, tmp_path if cached else None)
    for step in range(len(EXTENTS)):
        store.will_need(EXTENTS[max(0, step - 3) : step + 4])
        assert store.read(*EXTENTS[step]) == content(EXTENTS[step])
    store.close()
    assert origin.bytes_read <= len(EXTENTS) * SIZE
    again = store.read(*EXTENTS[-1])  # the reader let go of it: it may ask again
    assert again == content(EXTENTS[-1])
