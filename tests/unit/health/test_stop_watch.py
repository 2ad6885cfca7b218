import math
import threading
import time

import pytest

from dstrain.health import stop_watch
from dstrain.health.signals import StopRequest
from dstrain.health.stop_config import StopConfig
from dstrain.health.stop_watch import StopWatch


@pytest.fixture
def in_slurm(monkeypatch):
    """A SLURM job whose controller gives the answers of a list, the last one for ever."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    answers, asked = [None], []

    def answer(job):
        asked.append(job)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr(stop_watch, "ask_time_left", answer)
    return answers, asked


def watch(folder, stop, **settings):
    return StopWatch(stop, StopConfig(**settings), folder, num_devices=2, started=time.monotonic())


def test_the_stop_file_ends_the_run_for_good(tmp_path):
    stop = StopRequest()
    watcher = watch(tmp_path, stop)
    watcher.look()
    assert stop.reason is None
    (tmp_path / "stop").write_text("enough")
    watcher.look()
    assert (stop.reason, stop.requeue) == ("stop file: enough", False)


def test_a_reason_is_told_to_ranks_that_wait(tmp_path):
    stop, told = StopRequest(), []
    watcher = StopWatch(
        stop, StopConfig(), tmp_path, num_devices=2, started=time.monotonic(), tell=lambda: told.append(stop.reason)
    )
    watcher.look()
    assert told == []
    (tmp_path / "stop").touch()
    watcher.look()
    assert told == [stop.reason]


def test_the_save_file_asks_for_one_save(tmp_path):
    stop = StopRequest()
    watcher = watch(tmp_path, stop)
    (tmp_path / "save").touch()
    watcher.look()
    watcher.look()
    assert stop.take_save_wish()
    assert not stop.take_save_wish()
    assert stop.reason is None


def test_the_end_of_the_job_is_asked_for_again_because_it_can_move(tmp_path, in_slurm):
    answers, asked = in_slurm
    answers[:] = [5000.0, 100.0]
    stop = StopRequest()
    stop.set_needs(step_s=1.0, save_s=20.0)
    watcher = watch(tmp_path, stop, margin_s=90.0)
    assert stop.grace_left_s() is None
    watcher.look()
    watcher.look()  # not due yet
    assert asked == ["4711"]
    assert stop.grace_left_s() == pytest.approx(5000.0, abs=30)
    assert stop.reason is None
    watcher._next_question = -math.inf
    watcher.look()
    assert stop.reason == "the end of the SLURM job is near"
    assert stop.requeue
    assert not stop.hurry  # 100 s for a step and a save of 21 s
    assert stop.can_save(20.0)
    assert not stop.can_save(101.0)


def test_a_controller_that_is_silent_leaves_the_last_known_end_in_force(tmp_path, in_slurm):
    answers, asked = in_slurm
    answers[:] = [500.0, None]
    stop = StopRequest()
    watcher = watch(tmp_path, stop)
    for _ in range(2):
        watcher._next_question = -math.inf
        watcher.look()
    assert len(asked) == 2
    assert stop.grace_left_s() == pytest.approx(500.0, abs=30)


def test_a_limit_that_was_lifted_is_no_limit(tmp_path, in_slurm):
    answers, _ = in_slurm
    answers[:] = [500.0, math.inf]
    stop = StopRequest()
    watcher = watch(tmp_path, stop)
    for _ in range(2):
        watcher._next_question = -math.inf
        watcher.look()
    assert stop.grace_left_s() is None


def test_the_environment_stands_in_until_the_controller_answers(tmp_path, in_slurm, monkeypatch):
    answers, _ = in_slurm
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 300))
    stop = StopRequest()
    watcher = watch(tmp_path, stop)
    watcher.look()  # no answer
    assert stop.grace_left_s() == pytest.approx(300.0, abs=30)
    answers[:] = [4000.0]
    watcher._next_question = -math.inf
    watcher.look()
    assert stop.grace_left_s() == pytest.approx(4000.0, abs=30)


def test_slurm_is_left_alone_when_it_should_not_be_asked(tmp_path, in_slurm):
    stop = StopRequest()
    watch(tmp_path, stop, slurm_end=False).look()
    assert in_slurm[1] == []


def test_budgets_are_limits_from_the_start(tmp_path):
    stop = StopRequest()
    StopWatch(
        stop,
        StopConfig(max_device_hours=1.0),
        tmp_path,
        num_devices=2,
        started=time.monotonic(),
        earlier_device_s=3601.0,
    )
    assert (stop.reason, stop.requeue) == ("stop.max_device_hours: 1 are spent", False)
    assert stop.grace_left_s() is None  # nobody kills a run for its budget


def test_the_thread_looks_by_itself_and_survives_what_goes_wrong(tmp_path, monkeypatch):
    stop, seen = StopRequest(), threading.Event()
    real = stop_watch.stop_file_reason
    faults = [OSError("once")]

    def look(folder):
        if faults:
            raise faults.pop()
        seen.set()
        return real(folder)

    monkeypatch.setattr(stop_watch, "stop_file_reason", look)
    (tmp_path / "stop").touch()
    with watch(tmp_path, stop, look_every_s=0.01):
        assert seen.wait(30)
        deadline = time.monotonic() + 30
        while stop.reason is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert stop.reason == "stop file"
