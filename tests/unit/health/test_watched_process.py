import os
import signal
import subprocess
import sys

import pytest

from dstrain.health import watched_process as module
from dstrain.health.watched_process import ProcessId, WatchedProcess, end, identify

SLEEPER = "import time; print('ready', flush=True); time.sleep(1000)"
PARENT = (
    "import subprocess, sys, time\n"
    "children = [subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE) for _ in range(2)]\n"
    "for child in children: child.stdout.readline()\n"
    "print(*[c.pid for c in children], flush=True); time.sleep(1000)\n"
)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(params=["pidfd", "without"])
def handles(request, monkeypatch):
    """Both ways of watching: newer kernels, and those without pidfd."""
    if request.param == "without":

        def refuse(_pid):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(module.os, "pidfd_open", refuse)


def test_a_live_process_does_not_end_while_it_is_waited_for(sleeper, handles):
    watched = WatchedProcess(identify(sleeper.pid))
    assert not watched.wait(0.05)
    assert watched.state in "SR"
    assert watched.identity.is_alive


def test_the_end_is_seen_even_before_the_parent_has_collected_it(sleeper, handles):
    watched = WatchedProcess(identify(sleeper.pid))
    watched.signal(signal.SIGKILL)
    assert watched.wait(10)
    assert not watched.identity.is_alive  # a zombie still, as nobody has waited for it
    sleeper.wait()
    assert watched.state == ""
    watched.signal(signal.SIGKILL)  # nobody there: nothing happens


def test_a_stopped_process_says_so(sleeper):
    watched = WatchedProcess(identify(sleeper.pid))
    watched.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
    assert watched.state == "T"
    assert not watched.wait(0.01)


def test_a_number_used_again_is_another_process(sleeper, handles):
    real = identify(sleeper.pid)
    other = ProcessId(real.pid, real.started - 1)
    assert not other.is_alive
    with pytest.raises(ProcessLookupError):
        WatchedProcess(other)
    end([other])
    assert real.is_alive


def test_a_process_that_has_gone_cannot_be_watched(handles):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    identity = identify(gone.pid)
    gone.wait()
    assert identify(gone.pid) is None
    with pytest.raises(ProcessLookupError):
        WatchedProcess(identity)


def test_only_descendants_are_found_and_ended(sleeper):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, SLEEPER], stdout=subprocess.PIPE, text=True)
    first, second = map(int, parent.stdout.readline().split())
    watched = WatchedProcess(identify(parent.pid))
    assert {p.pid for p in watched.descendants(but_not=0)} == {first, second}
    assert [p.pid for p in watched.descendants(but_not=first)] == [second]
    grandchildren = WatchedProcess(identify(os.getpid())).descendants(but_not=sleeper.pid)
    assert {first, second, parent.pid} <= {p.pid for p in grandchildren}
    assert sleeper.pid not in {p.pid for p in grandchildren}
    children = [WatchedProcess(p) for p in watched.descendants(but_not=0)]
    end([child.identity for child in children])
    assert all(child.wait(10) for child in children)
    assert not watched.wait(0)
    parent.kill()
    parent.communicate()


def test_what_the_kernel_says_is_small_text(sleeper):
    details = WatchedProcess(identify(sleeper.pid)).details()
    assert set(details) <= {"wchan", "syscall", "stack"}
    assert all(0 < len(text) <= 2000 for text in details.values())
