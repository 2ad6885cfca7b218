import os
import signal
import subprocess
import sys

import pytest

from dstrain.health import signals
from dstrain.health.signals import STOP_SIGNALS, StopRequest
from dstrain.health.stop_deadline import Limit


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


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of the module under test, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def test_a_second_signal_says_hurry_and_what_launchers_send_on_at_once_does_not(clock):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes ctrl-C on in its own way
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.reason, stop.signal, stop.hurry) == ("SIGINT", "SIGINT", False)
        clock[0] += 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.hurry) == ("SIGINT", True)


def test_an_interrupt_after_hurry_is_for_a_person_who_has_had_enough(clock):
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # twice, from the terminal and from the launcher
            clock[0] += 1.5
        assert stop.hurry
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"


def test_other_signals_repeated_never_interrupt(clock):
    with StopRequest() as stop:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)
            clock[0] += 2.0
        assert (stop.reason, stop.hurry) == ("SIGTERM", True)


def test_the_grace_after_sigterm_is_counted_from_the_signal_even_if_it_is_told_later(clock):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 10.0
        assert stop.grace_left_s() is None
        assert stop.can_save(1e9)  # nobody knows better
        stop.set_grace(30.0)
        stop.set_needs(step_s=1.0, save_s=8.0)
        assert stop.grace_left_s() == 20.0
        assert not stop.hurry
        clock[0] += 8.0
        assert stop.hurry  # 12 s for a step, a save and a little
        assert stop.can_save(12.0)
        assert not stop.can_save(12.1)
        clock[0] += 20.0
        assert stop.grace_left_s() == -8.0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_warning_is_followed_by_no_kill_that_we_know_of(clock, number):
    with StopRequest() as stop:
        stop.set_grace(30.0)
        os.kill(os.getpid(), number)
        assert stop.grace_left_s() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.grace_left_s() == 30.0


def test_a_limit_asks_once_step_save_and_margin_just_fit(clock):
    stop = StopRequest()
    stop.set_needs(step_s=2.0, save_s=30.0)
    stop.set_limit("end", Limit(200.0, "the end is near", margin_s=60.0, kills=True))
    stop.set_limit("late", Limit(500.0, "later"))
    clock[0] = 107.9
    assert stop.reason is None
    stop.set_needs(save_s=30.2)  # measured again; the step stays
    assert (stop.reason, stop.requeue) == ("the end is near", True)
    assert stop.grace_left_s() == pytest.approx(92.1)
    stop.set_limit("end", None)
    assert stop.reason == "the end is near"
    assert stop.grace_left_s() is None


def test_a_spent_budget_ends_the_run_for_good_and_that_stays(clock):
    stop = StopRequest()
    stop.set_limit("budget", Limit(99.0, "spent", requeue=False))
    assert (stop.reason, stop.requeue) == ("spent", False)
    stop.ask("something else")
    assert (stop.reason, stop.requeue) == ("spent", False)


def test_a_kill_switch_after_a_signal_still_means_for_good():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.ask("stop file", requeue=False)
        assert (stop.reason, stop.requeue) == ("SIGUSR1", False)


def test_a_save_wish_is_told_once():
    stop = StopRequest()
    assert not stop.take_save_wish()
    stop.ask_save()
    assert stop.take_save_wish()
    assert not stop.take_save_wish()


CHILD = """
import os, signal, sys
from dstrain.health.signals import StopRequest
with StopRequest() as stop:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(os.getpid(), number)
        os.write(write, repr((stop.reason, stop.hurry)).encode())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(status, os.read(read, 100).decode(), stop.reason)
"""


def test_a_forked_child_neither_dies_of_a_stop_signal_nor_acts_on_it():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "0 (None, False) None\n"


IGNORING = """
import os, signal
from dstrain.health.signals import STOP_SIGNALS, ignore_stop_signals
ignore_stop_signals()
for number in STOP_SIGNALS:
    os.kill(os.getpid(), number)
print("alive")
"""


def test_a_worker_can_leave_stop_signals_to_its_parent():
    done = subprocess.run([sys.executable, "-c", IGNORING], capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"


def test_the_handlers_can_be_in_place_before_anything_heavy_is_imported():
    code = "import dstrain.health.signals, sys; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


ASKING = """
import sys
from dstrain.health.signals import StopRequest
from dstrain.health.stop_deadline import Limit
stop, events = StopRequest(watch_parent=True), []
stop.set_limit("end", Limit(1e12, "never", kills=True))
sys.addaudithook(lambda event, _: events.append(event))
for _ in range(3):
    stop.reason, stop.hurry, stop.grace_left_s(), stop.take_save_wish()
found = list(events)
open("/dev/null")
print(found, "open" in events)
"""


def test_asking_opens_no_file_and_starts_nothing():
    done = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


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
