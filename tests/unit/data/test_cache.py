"""P18, P20: shared by processes, true to its account, safe from kills, full disks and other people's folders."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError, StorageError
from dstrain.data import cache as cache_module
from dstrain.data.cache import DiskCache, cache_key
from tests.support.runs import ROOT

SIZE = 1000


def key(number: int, size: int = SIZE) -> str:
    return cache_key(f"{number:02x}" * 32, number * SIZE, size)


def opened(folder: Path, *, limit: int = 10 * SIZE, horizon: int = 2 * SIZE) -> DiskCache:
    return DiskCache(folder, limit_bytes=limit, horizon_bytes=horizon)


def content(number: int, size: int = SIZE) -> bytes:
    return bytes([number % 256]) * size


def on_disk(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("entries/*/*")}


def kept(cache: DiskCache) -> set[int]:
    return {number for number in range(40) if key(number) in cache}


def test_entries_are_private_named_by_content_and_counted(tmp_path):
    cache = opened(tmp_path)
    assert cache.put(key(1), content(1))
    assert cache.put(key(1), content(1))  # once more is nothing more
    assert cache.get(key(1)) == content(1)
    assert cache.get(key(2)) is None
    assert cache._usage() == SIZE
    assert on_disk(tmp_path) == {key(1): SIZE}
    for path in (cache.folder, *cache.folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0 or path.name == "usage" or path.suffix == ".plan", path
    cache.drop(key(1))
    assert (cache._usage(), on_disk(tmp_path)) == (0, {})
    for bad in ("../../etc/passwd", "x", key(1) + "/..", "s3-bucket-shard-000000.tar"):
        with pytest.raises(ValueError, match="no cache key"):
            cache.get(bad + "-1")


def test_what_is_needed_last_goes_first(tmp_path):
    cache = opened(tmp_path, limit=5 * SIZE)
    cache.plan({key(n): SIZE for n in (4, 2, 0, 3, 1, 5, 6)})
    for number in range(5):
        assert cache.put(key(number), content(number))
    assert cache.put(key(5), content(5))
    assert kept(cache) == {4, 2, 0, 3, 5}  # 1 was the furthest
    assert cache.put(key(20), content(20))  # in no plan: 5 is furthest now
    assert kept(cache) == {4, 2, 0, 3, 20}
    assert cache.put(key(21), content(21))
    assert kept(cache) == {4, 2, 0, 3, 21}  # what nobody plans to read goes before what somebody does


def test_of_what_nobody_plans_to_read_the_last_used_goes_first(tmp_path):
    cache = opened(tmp_path, limit=4 * SIZE)
    for number in range(4):
        cache.put(key(number), content(number))
        os.utime(cache._path(key(number)), (number, number))
    cache.get(key(1))
    cache.put(key(9), content(9))
    assert kept(cache) == {0, 2, 3, 9}


def test_the_horizon_of_any_live_process_is_never_evicted(tmp_path):
    """P18: also when all that could be evicted is inside a horizon; then the new entry is not kept."""
    one, two = opened(tmp_path, limit=4 * SIZE), opened(tmp_path, limit=4 * SIZE)
    one.plan({key(0): SIZE, key(1): SIZE})
    two.plan({key(2): SIZE, key(3): SIZE})
    for number in range(4):
        assert one.put(key(number), content(number))
    assert not one.put(key(9), content(9))
    assert not two.put(key(9), content(9))
    assert kept(one) == {0, 1, 2, 3}
    one.used([key(0)])
    two.close()  # its horizon ends with it
    assert one.put(key(9), content(9))
    assert {1, 9} <= kept(one)


def test_a_limit_below_the_horizons_of_a_node_is_refused(tmp_path):
    first = opened(tmp_path, limit=5 * SIZE, horizon=2 * SIZE)
    second = opened(tmp_path, limit=5 * SIZE, horizon=2 * SIZE)
    with pytest.raises(ConfigError, match=r"cache_limit_bytes: 5000 is less than the 6000 bytes that the 3 processes"):
        opened(tmp_path, limit=5 * SIZE, horizon=2 * SIZE)
    first.close()
    opened(tmp_path, limit=5 * SIZE, horizon=2 * SIZE).close()
    second.close()


def test_a_larger_entry_than_the_cache_is_not_kept(tmp_path):
    cache = opened(tmp_path)
    assert not cache.put(key(1, 11 * SIZE), content(1, 11 * SIZE))
    assert on_disk(tmp_path) == {}


def test_an_entry_of_the_wrong_length_or_kind_is_no_entry(tmp_path):
    cache = opened(tmp_path)
    cache.put(key(1), content(1))
    cache._path(key(1)).write_bytes(b"short")
    assert key(1) not in cache
    assert cache.get(key(1)) is None
    secret = tmp_path / "secret"
    secret.write_bytes(content(2))
    (cache.folder / "entries" / "02").mkdir(mode=0o700)
    cache._path(key(2)).symlink_to(secret)
    assert cache.get(key(2)) is None


def test_a_folder_that_others_may_enter_or_that_is_a_link_is_refused(tmp_path):
    name = f"dstrain-cache-v1-{os.getuid()}"
    (tmp_path / "open" / name).mkdir(parents=True, mode=0o755)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / name).symlink_to(tmp_path / "elsewhere")
    for folder in ("open", "link"):
        with pytest.raises(StorageError, match="refused as a cache"):
            opened(tmp_path / folder)


def test_a_full_disk_is_one_clear_error_and_costs_no_account(tmp_path, monkeypatch):
    cache = opened(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(StorageError, match=r"the disk is full: free some space or lower data\.storage\.cache_limit"):
        cache.put(key(1), content(1))
    monkeypatch.undo()
    assert (cache._usage(), on_disk(tmp_path)) == (0, {})
    assert cache.put(key(1), content(1))


def test_a_lost_or_damaged_account_is_made_again(tmp_path):
    cache = opened(tmp_path)
    for number in range(3):
        cache.put(key(number), content(number))
    for damage in (b"", b"many"):
        (cache.folder / "usage").write_bytes(damage)
        assert cache._usage() == 3 * SIZE
    (cache.folder / "usage").write_bytes(b"999999999")
    assert opened(tmp_path)._usage() == 3 * SIZE


def test_a_stopped_holder_of_the_lock_blocks_nobody_for_ever(tmp_path, monkeypatch):
    one, two = opened(tmp_path), opened(tmp_path)
    monkeypatch.setattr(cache_module, "LOCK_PATIENCE_S", 0.05)
    with one._locked():
        assert not two.put(key(1), content(1))
        assert two.get(key(1)) is None
    assert two.put(key(1), content(1))


def test_threads_of_several_processes_keep_the_account_true(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(tmp_path, seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = opened(tmp_path)
    assert sum(on_disk(tmp_path).values()) == cache._usage() <= 10 * SIZE
    assert list((cache.folder / "leases").glob("*.lease")) == [cache._lease._path]


def _hammer(folder: Path, seed: int) -> None:
    cache = opened(folder)

    def work(start: int) -> None:
        for k in range(12):
            number = (start * 7 + k * (3 + seed)) % 30
            found = cache.get(key(number))
            assert found is None or found == content(number)
            cache.put(key(number), content(number))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()


KILLED = """
import sys, os, time
from pathlib import Path
from dstrain.data.cache import DiskCache, cache_key
cache = DiskCache(Path(sys.argv[1]), limit_bytes=10000, horizon_bytes=2000)
cache.put(cache_key("aa" * 32, 0, 1000), bytes(1000))
os.fsync = lambda handle: (print("filling", flush=True), time.sleep(60))
cache.put(cache_key("bb" * 32, 0, 1000), bytes(1000))
"""


def test_a_kill_in_the_middle_of_a_fill_leaves_nothing_behind(tmp_path):
    """P18, P20: no partial entry is accepted, the lease ends with the process, and the next start is at once."""
    before = set(os.listdir("/dev/shm"))
    worker = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert worker.stdout.readline() == b"filling\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    assert any(name.startswith(".tmp-") for name in on_disk(tmp_path))
    begin = time.monotonic()
    cache = opened(tmp_path, limit=2000)  # would be refused while the other lives
    assert time.monotonic() - begin < 5
    assert on_disk(tmp_path) == {cache_key("aa" * 32, 0, 1000): 1000}
    assert cache._usage() == 1000
    assert cache.get(cache_key("bb" * 32, 0, 1000)) is None
    assert len(list((cache.folder / "leases").glob("*.lease"))) == 1
    assert set(os.listdir("/dev/shm")) <= before
