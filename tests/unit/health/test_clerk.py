import threading

from dstrain.base.errors import StorageError
from dstrain.health.clerk import Clerk


def test_a_job_gives_its_result():
    assert Clerk().do(lambda: 7, seconds=30) == 7


def test_who_waits_is_not_held_up_by_a_job_that_never_ends():
    clerk, gate = Clerk(), threading.Event()
    assert clerk.do(gate.wait, seconds=0.01) is None
    assert clerk.is_busy
    assert clerk.do(lambda: 7, seconds=0.01) is None  # not begun: one at a time
    gate.set()
    assert clerk.do(lambda: 8, seconds=30) == 8


def test_a_started_job_is_taken_once():
    clerk, gate = Clerk(), threading.Event()
    clerk.start(lambda: gate.wait() and "done")
    assert clerk.take() is None
    gate.set()
    clerk._idle.wait(30)
    assert not clerk.is_busy
    assert (clerk.take(), clerk.take()) == ("done", None)


def test_a_storage_fault_is_no_result_and_no_end():
    def fail():
        raise StorageError("full")

    clerk = Clerk()
    assert clerk.do(fail, seconds=30) is None
    assert clerk.do(lambda: 1, seconds=30) == 1


def test_a_defect_is_shown_and_does_not_leave_it_busy(monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    clerk = Clerk()
    assert clerk.do(lambda: 1 / 0, seconds=30) is None
    while not shown:
        pass
    assert shown[0].exc_type is ZeroDivisionError
    assert clerk.do(lambda: 1, seconds=30) == 1
