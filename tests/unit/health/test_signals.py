import os
import signal
import subprocess
import sys

import pytest

from dstrain.health.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_signal_becomes_a_reason_and_nothing_else(number):
    with StopRequest(watch_parent=False) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name


def test_the_first_reason_stays():
    with StopRequest(watch_parent=False) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        stop.ask("the time is up")
        assert stop.reason == "SIGUSR1"


def test_the_program_itself_may_ask():
    stop = StopRequest(watch_parent=False)
    stop.ask("the time is up")
    stop.ask("something else")
    assert stop.reason == "the time is up"


def test_a_second_interrupt_is_for_a_person_who_has_had_enough():
    with StopRequest(watch_parent=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"


def test_other_signals_repeated_never_interrupt():
    with StopRequest(watch_parent=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first interrupt after others
        assert stop.reason == "SIGTERM"


def test_sigcont_is_no_stop_request():
    with StopRequest(watch_parent=False) as stop:
        os.kill(os.getpid(), signal.SIGCONT)
        assert stop.reason is None


def test_old_handlers_come_back_even_after_a_fault():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def run():
        with StopRequest(watch_parent=False):
            assert all(signal.getsignal(number) != before[number] for number in STOP_SIGNALS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


ORPHAN = """
import os, sys
from dstrain.health.signals import StopRequest
stop, plain = StopRequest(watch_parent=True), StopRequest(watch_parent=False)
print(stop.reason, flush=True)
sys.stdin.readline()
while os.getppid() == int(sys.argv[1]): pass
print(stop.reason, plain.reason, flush=True)
"""


def test_a_rank_whose_launcher_died_asks_for_a_stop():
    read, write = os.pipe()
    gate_read, gate_write = os.pipe()
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import os, subprocess, sys; "
         "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]).wait()", ORPHAN],
        stdin=gate_read, stdout=write,
    )  # fmt: skip
    os.close(write)
    os.close(gate_read)
    with os.fdopen(read) as output:
        assert output.readline() == "None\n"
        launcher.kill()
        launcher.wait()
        os.write(gate_write, b"go\n")
        assert output.readline() == "the launcher is gone None\n"
    os.close(gate_write)
