import faulthandler
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.hang_report import describe, find_suspect, in_collective, is_alibi, main_frames, position
from dstrain.health.heartbeat import Phase

HUNG = {"kind": "hung", "number": 1, "rank": 0, "host": "n0"}
WAITING = ["/x/torch/distributed/distributed_c10d.py:3000 all_reduce", "/x/dstrain/train/engine.py:1 step"]
COMPUTING = ["/x/torch/nn/modules/linear.py:100 forward", "/x/dstrain/models/encoders.py:9 forward"]


def facts(rank, *, step=9, phase="step", state="S", frames=WAITING, acknowledged=1, ended="", **more):
    return {
        "rank": rank, "host": f"n{rank}", "step": step, "phase": phase, "state": state, "frames": frames,
        "acknowledged": acknowledged, "ended": ended, "time_in_phase_s": 31.0, "allowance_s": 30.0, **more,
    }  # fmt: skip


def others(*ranks, **changes):
    return [facts(r, **changes) for r in ranks]


def test_the_rank_that_is_behind_in_step_holds_the_others_up():
    found = find_suspect(HUNG, [facts(0), facts(1, step=8), facts(2)])
    assert (found.cause, found.rank, found.host) == ("hung", 1, "n1")
    assert found.is_the_nodes
    assert "is behind the others, in phase step of step 8 for 31 s" in found.reason


@pytest.mark.parametrize("phase", ["data", "save", "restore"])
def test_behind_in_a_phase_of_files_is_storage_and_not_the_nodes_fault(phase):
    found = find_suspect(HUNG, [facts(0), facts(1), facts(2, phase=phase, frames=[])])
    assert (found.cause, found.rank) == ("storage", 2)
    assert not found.is_the_nodes


def test_waiting_for_a_device_is_storage_in_any_phase():
    found = find_suspect(HUNG, [facts(0, step=8, state="D"), facts(1)])
    assert (found.cause, found.rank) == ("storage", 0)
    assert "state D" in found.reason


def test_at_the_same_place_the_one_outside_the_collective_is_the_suspect():
    found = find_suspect(HUNG, [facts(0), facts(1), facts(2, frames=COMPUTING), facts(3)])
    assert (found.cause, found.rank) == ("hung", 2)
    assert "the only one that waits in no collective" in found.reason


@pytest.mark.parametrize("frames", [[WAITING, WAITING], [COMPUTING, COMPUTING], [[], []]])
def test_when_nothing_tells_them_apart_none_is_named(frames):
    found = find_suspect(HUNG, [facts(r, frames=f) for r, f in enumerate(frames)])
    assert (found.cause, found.rank, found.is_the_nodes) == ("unknown", None, False)
    assert "ranks 0, 1 wait alike" in found.reason


@pytest.mark.parametrize("state", ["T", "t"])
def test_a_stopped_process_is_the_cause_even_when_another_is_behind(state):
    found = find_suspect(HUNG, [facts(0, step=8), facts(1, state=state, frames=[])])
    assert (found.cause, found.rank, found.is_the_nodes) == ("stopped", 1, True)


@pytest.mark.parametrize("silent", [None, facts(1, acknowledged=None), facts(1, acknowledged=0)])
def test_a_watchdog_that_does_not_answer_is_the_cause_before_all_others(silent):
    found = find_suspect(HUNG, [facts(0, state="T"), silent])
    assert (found.cause, found.rank, found.is_the_nodes) == ("silent", 1, True)
    assert "the watchdog of rank 1 does not answer" in found.reason


def test_a_host_whose_link_went_down_is_named_though_all_ranks_wait_alike():
    found = find_suspect(HUNG, [facts(0, step=8, lost_links=[]), facts(1, lost_links=["eth0"])])
    assert (found.cause, found.rank, found.host, found.is_the_nodes) == ("network", 1, "n1", True)
    assert "the link eth0 of its host has gone down" in found.reason


@pytest.mark.parametrize(("away", "suspect"), [({2}, 2), ({1, 2}, 0), ({1}, 1)])
def test_of_three_hosts_the_one_that_is_out_of_the_others_reach_is_named(away, suspect):
    found = find_suspect(HUNG, [facts(r, reaches_meeting_point=r not in away) for r in range(3)])
    assert (found.cause, found.rank, found.is_the_nodes) == ("network", suspect, True)


def test_between_two_hosts_that_do_not_reach_each_other_neither_is_named():
    found = find_suspect(HUNG, [facts(0, reaches_meeting_point=True), facts(1, reaches_meeting_point=False)])
    assert (found.cause, found.rank, found.is_the_nodes) == ("network", None, False)
    assert "n1 and n0 do not reach each other" in found.reason


@pytest.mark.parametrize("view", [{"lost_links": ["ib0"]}, {"reaches_meeting_point": False}])
def test_the_network_is_not_blamed_when_all_hosts_see_the_same_or_a_rank_waits_in_no_collective(view):
    assert find_suspect(HUNG, [facts(0, **view), facts(1, **view)]).cause == "unknown"
    found = find_suspect(HUNG, [facts(0, **view), facts(1, frames=COMPUTING), facts(2)])
    assert (found.cause, found.rank) == ("hung", 1)


def test_a_rank_that_has_finished_is_neither_silent_nor_behind():
    done = facts(1, step=1, acknowledged=None, ended="cleanly")
    found = find_suspect(HUNG, [facts(0), done, facts(2, phase="save")])
    assert found.rank == 2


def test_nobody_answers():
    assert find_suspect(HUNG, [None, None]).cause == "unknown"


def test_a_single_rank_is_its_own_suspect():
    found = find_suspect(HUNG, others(0, frames=COMPUTING))
    assert (found.cause, found.rank) == ("hung", 0)
    assert "makes no progress in phase step" in found.reason


@pytest.mark.parametrize("kind", ["died", "left"])
def test_a_known_cause_is_taken_from_the_alarm(kind):
    alarm = {"kind": kind, "number": 4, "rank": 2, "host": "n2", "detail": "it is gone"}
    found = find_suspect(alarm, [facts(0), None, None])
    assert (found.cause, found.rank, found.host, found.reason) == (kind, 2, "n2", "it is gone")
    assert not found.is_the_nodes
    assert describe(alarm, found) == f"incident 4 ({kind}), noticed by rank 2 on n2: suspect: rank 2 on n2: it is gone"


@given(st.integers(2, 64), st.data())
def test_exactly_one_rank_behind_is_found_among_any_number(size, data):
    guilty = data.draw(st.integers(0, size - 1))
    phase = data.draw(st.sampled_from(["data", "first_step"]))
    ranks = [facts(r, phase=phase if r == guilty else "step") for r in range(size)]
    assert find_suspect(HUNG, ranks).rank == guilty


def test_places_follow_the_order_of_the_loop():
    way = [
        (0, Phase.START_UP), (0, Phase.RENDEZVOUS), (0, Phase.RESTORE), (4, Phase.EVALUATE), (4, Phase.SAVE), (4, Phase.DATA),
        (4, Phase.FIRST_STEP), (5, Phase.DATA), (5, Phase.STEP), (6, Phase.EVALUATE), (6, Phase.FINISH),
    ]  # fmt: skip
    places = [position({"step": step, "phase": phase.value}) for step, phase in way]
    assert places == sorted(set(places))


def test_a_peer_that_loads_data_within_its_allowance_explains_a_long_step():
    waiting = facts(0)
    slow = facts(1, phase="data", allowance_s=300.0)
    assert is_alibi(waiting, slow)
    assert not is_alibi(slow, waiting)  # the other way round
    assert not is_alibi(waiting, {**slow, "time_in_phase_s": 301.0})
    assert not is_alibi(waiting, {**slow, "state": "T"})
    assert not is_alibi(waiting, {**slow, "state": ""})
    assert not is_alibi(waiting, {**slow, "ended": "died"})
    assert not is_alibi(waiting, {**slow, "phase": "step"})


def test_the_main_threads_frames_are_read_from_a_real_dump(tmp_path):
    hold = threading.Event()
    thread = threading.Thread(target=hold.wait)
    thread.start()

    def dump_from_here():
        with open(tmp_path / "stacks", "a") as file:
            file.write("Fatal Python error: Segmentation fault\n\n")
            faulthandler.dump_traceback(file=file, all_threads=True)
            faulthandler.dump_traceback(file=file, all_threads=True)

    dump_from_here()
    hold.set()
    thread.join()
    frames = main_frames((tmp_path / "stacks").read_text())
    assert frames[0].startswith(f"{__file__}:")
    assert frames[0].endswith(" dump_from_here")
    assert frames[1].endswith(" test_the_main_threads_frames_are_read_from_a_real_dump")
    assert main_frames("") == []


def test_only_the_innermost_frames_tell_of_a_collective():
    assert in_collective(WAITING)
    assert not in_collective(COMPUTING)
    assert not in_collective([*COMPUTING * 4, *WAITING])
