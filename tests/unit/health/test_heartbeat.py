import os
import signal
import subprocess
import sys
import threading

import pytest

from dstrain.health import heartbeat as heartbeat_module
from dstrain.health.heartbeat import RECENT_STEPS, Ended, Heartbeat, HeartbeatReader, Phase


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [10_000_000_000]
    monkeypatch.setattr(heartbeat_module.time, "monotonic_ns", lambda: now[0])

    def pass_s(seconds):
        now[0] += round(seconds * 1e9)

    return pass_s


@pytest.fixture
def pair(clock):
    beat = Heartbeat()
    reader = HeartbeatReader(beat.descriptor)
    yield beat, reader
    beat.close()


def test_a_new_heartbeat_is_starting_up(pair):
    found = pair[1].read()
    assert (found.phase, found.step, found.ended, found.recent_steps_s) == (Phase.START_UP, 0, Ended.RUNNING, ())
    assert found.stamp_ns == 10_000_000_000


@pytest.mark.parametrize("phase", list(Phase))
def test_the_reader_sees_phase_step_and_time(pair, clock, phase):
    beat, reader = pair
    before = reader.read().counter
    clock(2.5)
    beat.enter(phase, 1 << 40)
    found = reader.read()
    assert (found.phase, found.step, found.stamp_ns) == (phase, 1 << 40, 12_500_000_000)
    assert found.counter > before


def test_the_loops_plain_names_are_phases(pair):
    pair[0].enter("evaluate", 3)
    assert pair[1].read().phase is Phase.EVALUATE
    with pytest.raises(KeyError):
        pair[0].enter("lunch", 3)


def test_entering_the_same_phase_again_is_progress(pair, clock):
    beat, reader = pair
    beat.enter(Phase.EVALUATE, 3)
    first = reader.read()
    clock(1)
    beat.enter(Phase.EVALUATE, 3)
    second = reader.read()
    assert second.counter > first.counter
    assert second.stamp_ns - first.stamp_ns == 1_000_000_000


def test_durations_of_recent_steps_and_longest_stays_are_kept(pair, clock):
    beat, reader = pair
    for step in range(3):
        beat.enter(Phase.DATA, step)
        clock(0.25)
        beat.enter(Phase.STEP, step)
        clock(1 + step)
    assert sorted(reader.read().recent_steps_s) == [1.0, 2.0]  # the third is not over yet
    beat.enter(Phase.SAVE, 3)
    clock(9)
    beat.enter(Phase.DATA, 3)
    found = reader.read()
    assert sorted(found.recent_steps_s) == [1.0, 2.0, 3.0]
    longest = dict(zip(Phase, found.longest_s))
    assert {p: s for p, s in longest.items() if s} == {Phase.DATA: 0.25, Phase.STEP: 3.0, Phase.SAVE: 9.0}


def test_old_steps_are_forgotten(pair, clock):
    beat, reader = pair
    for step in range(2 * RECENT_STEPS):
        beat.enter(Phase.STEP, step)
        clock(1 if step < RECENT_STEPS else 2)
    beat.enter(Phase.DATA, 0)
    assert reader.read().recent_steps_s == (2.0,) * RECENT_STEPS


def test_another_thread_does_not_make_a_hung_rank_look_alive(pair):
    beat, reader = pair
    before = reader.read()
    thread = threading.Thread(target=beat.enter, args=(Phase.STEP, 7))
    thread.start()
    thread.join()
    assert reader.read() == before


@pytest.mark.parametrize("ended", [Ended.CLEANLY, Ended.BY_A_FAULT, Ended.BY_A_LOST_PEER])
def test_closing_says_how_it_ended_and_keeps_the_place(pair, ended):
    beat, reader = pair
    beat.enter(Phase.SAVE, 5)
    beat.close(ended)
    beat.close(Ended.BY_A_FAULT if ended is Ended.CLEANLY else Ended.CLEANLY)  # the first word counts
    beat.enter(Phase.STEP, 6)
    found = reader.read()
    assert (found.ended, found.phase, found.step) == (ended, Phase.SAVE, 5)


def test_the_rank_is_asked_to_look_after_its_watchdog_at_most_every_ten_seconds(clock):
    calls = []
    beat = Heartbeat(on_check=lambda: calls.append(1))
    for _ in range(100):
        clock(0.5)
        beat.enter(Phase.STEP, 0)
    assert 4 <= len(calls) <= 5
    beat.close()


READER = """
import sys
from dstrain.health.heartbeat import HeartbeatReader
reader = HeartbeatReader(int(sys.argv[1]))
last, looks = -1, 0
while True:
    beat = reader.read()
    assert beat.counter >= last and beat.counter % 2 == 0, beat
    # Whoever writes keeps step and place in step: a torn reading would mix two of them.
    assert beat.step % 9 == list(type(beat.phase)).index(beat.phase), beat
    last, looks = beat.counter, looks + 1
    if looks == 1:
        print("ready", flush=True)
    if beat.step == 899:
        print(looks, flush=True)
        break
"""


def test_another_process_never_sees_a_torn_reading():
    beat = Heartbeat()
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(beat.descriptor)], pass_fds=[beat.descriptor], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert reader.stdout.readline() == "ready\n"
    phases = list(Phase)
    for _ in range(300):
        for step in range(891):
            beat.enter(phases[step % 9], step)
    beat.enter(phases[899 % 9], 899)
    assert int(reader.communicate(timeout=60)[0]) > 1
    assert reader.returncode == 0
    beat.close()


def test_what_a_killed_rank_wrote_last_can_be_read():
    code = (
        "import os, sys; from dstrain.health.heartbeat import *; h = Heartbeat(); h.enter(Phase.SAVE, 12);"
        "os.dup2(h.descriptor, int(sys.argv[1])); print('ready', flush=True); sys.stdin.readline()"
    )
    beat = Heartbeat()  # only its descriptor's number is used, to hand the child's memory over
    spare = os.memfd_create("spare")
    rank = subprocess.Popen(
        [sys.executable, "-c", code, str(spare)], pass_fds=[spare], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert rank.stdout.readline() == "ready\n"
    theirs = os.open(f"/proc/{rank.pid}/fd/{spare}", os.O_RDONLY)
    rank.send_signal(signal.SIGKILL)
    rank.communicate()
    found = HeartbeatReader(theirs).read()
    assert (found.phase, found.step, found.ended) == (Phase.SAVE, 12, Ended.RUNNING)
    os.close(theirs)
    os.close(spare)
    beat.close()
