import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dstrain.health.signals import StopRequest
from dstrain.health.stop_relay import KEY, StopRelay


class Shared:
    """A store of this process."""

    def __init__(self):
        self.values, self.sets, self.checks, self.came = {}, 0, 0, threading.Event()

    def set(self, key, value):
        self.sets += 1
        self.values[key] = value
        self.came.set()

    def check(self, keys):
        self.checks += 1
        return all(key in self.values for key in keys)


class Gone:
    """A store whose host has left."""

    def set(self, key, value):
        raise RuntimeError("connection reset")

    def check(self, keys):
        raise RuntimeError("connection reset")


def test_a_rank_that_waits_learns_what_another_was_asked():
    store = Shared()
    asked, waiting = StopRequest(), StopRequest()
    with StopRelay(waiting, store, look_every_s=0.0) as there:
        assert not there.should_leave()
        asked.ask("the time is up")
        assert StopRelay(asked, store).should_leave()
        assert there.should_leave()
        assert waiting.reason == "asked on another rank"


def test_however_many_threads_wait_the_store_is_asked_twice_a_second():
    store = Shared()
    with StopRelay(StopRequest(), store) as relay:
        assert not any(relay.should_leave() for _ in range(1000))
    assert store.checks <= 1 + 2  # the loop would have to take a second and more


def test_the_own_reason_stays_and_is_told_once():
    store, stop = Shared(), StopRequest()
    stop.ask("stop file")
    with StopRelay(stop, store) as relay:
        for _ in range(3):
            assert relay.should_leave()
    assert (stop.reason, store.sets, store.checks) == ("stop file", 1, 0)


def test_a_signal_is_told_while_the_main_thread_stands_where_python_runs_no_handler():
    """As in a collective: the handler has to wait, the word does not. Threads share the signal's process, not its handler."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "told None\nthen SIGUSR1\n"


BLOCKED = """
import ctypes, os, signal, threading
from dstrain.health.signals import StopRequest
from dstrain.health.stop_relay import StopRelay
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)  # a zeroed pthread mutex, which no signal interrupts
class Store:
    def set(self, key, value):
        print("told", stop.reason, flush=True)
        libc.pthread_mutex_unlock(mutex)  # the other rank comes to the collective
    def check(self, keys):
        return False
with StopRequest() as stop, StopRelay(stop, Store()):
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
    libc.pthread_mutex_lock(mutex)
    print("then", stop.reason, flush=True)
"""


def test_other_signals_are_no_stop(monkeypatch):
    store, stop = Shared(), StopRequest()
    with stop, StopRelay(stop, store):
        previous = signal.signal(signal.SIGWINCH, lambda *_: None)
        os.kill(os.getpid(), signal.SIGWINCH)
        signal.signal(signal.SIGWINCH, previous)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert store.came.wait(30)
    assert store.sets == 1
    assert store.values == {KEY: "stop"}


def test_a_store_that_is_gone_stops_nobody_from_leaving():
    stop = StopRequest()
    with StopRelay(stop, Gone()) as relay:
        assert not relay.should_leave()
        stop.ask("stop file")
        assert relay.should_leave()


def test_alone_only_the_own_request_counts():
    stop = StopRequest()
    with StopRelay(stop, None) as relay:
        assert not relay.should_leave()
        stop.ask("stop file")
        assert relay.should_leave()


@pytest.mark.parametrize("store", [None, Shared()])
def test_nothing_is_left_behind(store):
    before = signal.set_wakeup_fd(-1), set(os.listdir("/proc/self/fd")), threading.active_count()
    signal.set_wakeup_fd(before[0])
    with StopRelay(StopRequest(), store):
        pass
    after = signal.set_wakeup_fd(-1), set(os.listdir("/proc/self/fd")), threading.active_count()
    assert after == before


def test_a_flood_of_signals_fills_no_pipe():
    store, stop = Shared(), StopRequest()
    with stop, StopRelay(stop, store):
        started = time.monotonic()
        for _ in range(20_000):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert time.monotonic() - started < 60
    assert (stop.reason, store.sets) == ("SIGUSR1", 1)
