from __future__ import annotations

import random
import threading

import pytest

from dstrain.base.errors import DataError, StorageError
from dstrain.base.locations import RemoteUrl
from dstrain.base.protocols import Interrupted, never
from dstrain.base.remote import TransientRemoteError
from dstrain.data import remote_store
from dstrain.data.remote_store import RemoteStore
from dstrain.data.stores import StorageConfig


class Flaky:
    """Fails `failures` times, then answers zeros; remembers the limits it was given."""

    def __init__(self, failures: float, error: Exception | None = None) -> None:
        self.failures, self.error, self.limits = failures, error or TransientRemoteError("HTTP status 503"), []

    def read_range(self, name, offset, length, *, timeout_s):
        self.limits.append(timeout_s)
        if len(self.limits) <= self.failures:
            raise self.error
        return bytes(length)

    def size(self, name, *, timeout_s):
        return len(self.read_range(name, 0, 7, timeout_s=timeout_s))

    def close(self):
        pass


def store(folder: Flaky, *, should_leave=never, **settings) -> RemoteStore:
    url = RemoteUrl("https", "https://host/data", "sig=secret")
    return RemoteStore(url, StorageConfig(**{"deadline_s": 5.0, **settings}), folder=folder, should_leave=should_leave)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote_store, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote_store, "LONGEST_WAIT_S", 0.01)


def test_passing_faults_are_tried_again_and_counted():
    origin = store(Flaky(6))
    assert origin.read("a", 5, 9) == bytes(9)
    assert origin.size("a") == 7
    assert (origin.requests, origin.bytes_read) == (8, 9)


def test_the_deadline_ends_in_one_clear_message():
    folder = Flaky(float("inf"))
    with pytest.raises(
        StorageError, match=r"https://host/data/a: not readable: \d+ tries in 0\.\d s .*status 503"
    ) as end:
        store(folder, deadline_s=0.2).read("a", 0, 1)
    assert "secret" not in str(end.value)
    assert len(folder.limits) > 2
    assert all(0 < limit <= 0.2 for limit in folder.limits)  # no try outlives the deadline


def test_what_another_try_cannot_mend_is_told_at_once():
    folder = Flaky(99, DataError("no such file"))
    with pytest.raises(DataError, match="no such file"):
        store(folder).read("a", 0, 1)
    assert len(folder.limits) == 1


def test_closing_ends_waits(monkeypatch):
    monkeypatch.setattr(remote_store, "FIRST_WAIT_S", 1e6)
    monkeypatch.setattr(remote_store, "LONGEST_WAIT_S", 1e6)
    origin = store(Flaky(99), deadline_s=1e9)
    threading.Timer(0.05, origin.close).start()
    with pytest.raises(StorageError, match="not readable"):
        origin.read("a", 0, 1)


def test_a_stop_request_ends_the_wait_between_two_tries(monkeypatch):
    monkeypatch.setattr(remote_store, "FIRST_WAIT_S", 1e6)
    monkeypatch.setattr(remote_store, "LONGEST_WAIT_S", 1e6)
    asked = threading.Event()
    threading.Timer(0.05, asked.set).start()
    with pytest.raises(Interrupted, match=r"asked to stop while waiting for https://host/data$"):
        store(Flaky(99), deadline_s=1e9, should_leave=asked.is_set).read("a", 0, 1)


def test_what_answers_is_read_also_by_who_was_asked_to_stop():
    assert store(Flaky(0), should_leave=lambda: True).read("a", 0, 1) == bytes(1)


def test_waits_do_not_touch_the_global_random_stream():
    random.seed(1)
    before = random.getstate()
    store(Flaky(5)).read("a", 0, 1)
    assert random.getstate() == before
