"""Stop signals are kept until somebody looks, and end a wait."""

from __future__ import annotations

import os
import signal
import threading
import time

from dstrain.launcher.stop_signals import SIGNALS, StopSignals


def test_every_stop_signal_is_kept_in_order_and_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert stop.received == list(SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == []
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_ends_a_wait_of_an_hour() -> None:
    with StopSignals() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert stop.wait(3600.0)


def test_without_a_signal_the_whole_wait_is_waited() -> None:
    started = time.monotonic()
    with StopSignals() as stop:
        assert not stop.wait(0.05)
    assert time.monotonic() - started >= 0.05
