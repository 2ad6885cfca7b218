import logging
import os
import time

import pytest

from dstrain.train.op_cache import STALE_AFTER_S, cache_folder, clear_stale_locks


@pytest.fixture
def messages():
    """What the module logged, whatever became of the loggers above it."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("dstrain.train.op_cache")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def plant(folder, *, age_s):
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    lock.touch()
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return lock


@pytest.mark.parametrize("place", ["cpu_adam", "py311_cpu/cpu_adam"])
def test_an_old_lock_that_nobody_holds_is_removed_and_named(place, tmp_path, messages):
    lock = plant(tmp_path / place, age_s=2 * STALE_AFTER_S)
    assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert messages == [f"compiled-op cache: removed {lock}, left 20 minutes ago by a killed build"]


def test_an_old_lock_that_a_process_holds_open_stays(tmp_path, messages):
    lock = plant(tmp_path / "op", age_s=2 * STALE_AFTER_S)
    with open(lock):
        assert clear_stale_locks(tmp_path) == []
        assert lock.exists()
        assert messages == []
    assert clear_stale_locks(tmp_path) == [lock]


def test_a_young_lock_stays_and_is_named(tmp_path, messages):
    lock = plant(tmp_path / "op", age_s=30)
    assert clear_stale_locks(tmp_path) == []
    assert lock.exists()
    assert len(messages) == 1
    assert str(lock) in messages[0]
    assert "not waited for" in messages[0]


def test_the_age_at_which_a_lock_is_stale_can_be_chosen(tmp_path):
    lock = plant(tmp_path / "op", age_s=30)
    assert clear_stale_locks(tmp_path, stale_after_s=20) == [lock]


def test_nothing_but_locks_is_touched(tmp_path):
    old = plant(tmp_path / "op", age_s=2 * STALE_AFTER_S)
    for name in ("op.so", "build.ninja", "lockfile"):
        (tmp_path / "op" / name).touch()
    deep = plant(tmp_path / "a" / "b" / "c", age_s=2 * STALE_AFTER_S)  # deeper than torch ever puts one
    assert clear_stale_locks(tmp_path) == [old]
    assert deep.exists()
    assert sorted(p.name for p in (tmp_path / "op").iterdir()) == ["build.ninja", "lockfile", "op.so"]


def test_one_lock_that_cannot_be_removed_does_not_keep_the_others(tmp_path, monkeypatch):
    first, second = (plant(tmp_path / name, age_s=2 * STALE_AFTER_S) for name in ("a", "b"))
    real = type(first).unlink

    def unlink(self, missing_ok=False):
        if self == first:
            raise PermissionError
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(type(first), "unlink", unlink)
    assert clear_stale_locks(tmp_path) == [second]


def test_a_cache_that_does_not_exist_is_no_fault(tmp_path):
    assert clear_stale_locks(tmp_path / "none") == []


def test_the_cache_is_where_torch_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert cache_folder() == tmp_path / "torch_extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    lock = plant(tmp_path / "own" / "op", age_s=2 * STALE_AFTER_S)
    assert clear_stale_locks() == [lock]
