import os
import signal
import subprocess
import sys
import time

import pytest

from dstrain.health import rank_view
from dstrain.health.heartbeat import Phase
from dstrain.health.rank_view import RankView


@pytest.fixture
def view(settings):
    return RankView(settings)


def test_the_facts_say_where_the_rank_is_and_for_how_long(view, heartbeat, settings):
    heartbeat.enter(Phase.SAVE, 12)
    first = view.facts(view.beat())
    assert (first["phase"], first["step"], first["pid"], first["ended"]) == ("save", 12, settings.pid, "")
    assert first["allowance_s"] == settings.budgets.save_s
    later = view.facts(view.beat())
    assert later["time_in_phase_s"] >= first["time_in_phase_s"]
    assert later["sequence"] == first["sequence"] + 1


def test_a_stopped_rank_is_seen_to_be_stopped_and_for_how_long(view, rank):
    os.kill(rank.pid, signal.SIGSTOP)
    while view.process.state != "T":
        time.sleep(0.001)
    view.facts(view.beat())
    time.sleep(0.02)
    assert view.facts(view.beat())["state"] == "T"
    os.kill(rank.pid, signal.SIGCONT)


CHILD = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); sys.stdin.readline()"


def test_children_are_counted_once_a_second_and_not_forgotten_when_the_rank_has_died(settings, monkeypatch):
    parent = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        monkeypatch.setattr(rank_view, "WatchedProcess", lambda _identity: _of(parent.pid))
        view = RankView(settings)
        view.count_children()
        assert [p.pid for p in view.children] == [child]
        os.kill(child, signal.SIGKILL)
        while view.children[0].is_alive:
            time.sleep(0.001)
        view.count_children()  # too soon to look again
        assert [p.pid for p in view.children] == [child]
        parent.kill()
        parent.wait()
        view.count_children_again()
        assert [p.pid for p in view.children] == [child]
    finally:
        parent.kill()
        parent.communicate()


def _of(pid):
    from dstrain.health.watched_process import WatchedProcess, identify

    return WatchedProcess(identify(pid))
