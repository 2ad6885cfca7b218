"""Ranks as threads around one store: who is missing, who cannot take part, who was asked to stop, and that all hear the same."""

import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from dstrain.base.errors import ConfigError, DstrainError, MachineError, PeerError, PeerGoneError
from dstrain.base.protocols import Interrupted
from dstrain.base.roll_call import Waiting, Word, call_roll, judge_words
from dstrain.base.world import World

QUICK = Waiting(join_s=2.0, poll_s=0.02, late_s=0.2)


def meet(size, words, *, waiting=None, local_size=None):
    """What each rank that is in `words` comes to; the others never start."""
    store, results = HashStore(), {}

    def rank(number):
        world = World(rank=number, size=size, local_rank=number, local_size=local_size or size)
        try:
            call_roll(store, world, words[number], (waiting or {}).get(number, QUICK))
            results[number] = "together"
        except (DstrainError, Interrupted) as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == len(words), "every rank came back"
    return results


def test_when_all_are_there_all_go_on():
    assert meet(4, {rank: Word("a") for rank in range(4)}) == dict.fromkeys(range(4), "together")


def test_missing_ranks_are_named_in_time_to_all_who_came_with_their_hosts():
    hosts = ("node1", "node1", "node2", "node2")
    found = meet(4, {0: Word("node1"), 1: Word("node1")}, waiting={0: replace(QUICK, expected=hosts)}, local_size=2)
    assert isinstance(found[0], PeerGoneError)
    assert "ranks 2, 3 (on node2) of 4 did not come" in str(found[0])
    assert isinstance(found[1], PeerError)
    assert (str(found[1]), found[1].exit_code) == (str(found[0]), 76)


def test_a_rank_that_cannot_take_part_ends_the_wait_at_once_and_speaks_for_itself():
    patient = replace(QUICK, join_s=60)
    words = {0: Word("node1"), 2: Word("node2", fault="no GPU", code=77)}  # rank 1 never comes, and is not waited for
    found = meet(3, words, waiting={0: patient, 2: patient})
    assert isinstance(found[2], MachineError)
    assert isinstance(found[0], PeerError)
    assert {str(error) for error in found.values()} == {"rank 2 on node2: no GPU"}
    assert found[0].exit_code == 77


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_stop_request_to_any_rank_ends_the_wait_of_all(asked):
    patient = replace(QUICK, join_s=60)
    waiting = {rank: replace(patient, should_leave=lambda rank=rank: rank == asked) for rank in range(3)}
    found = meet(4, {rank: Word("a") for rank in range(3)}, waiting=waiting)
    assert all(isinstance(error, Interrupted) for error in found.values())


@given(st.lists(st.sampled_from(["cpu", "cuda"]), min_size=1, max_size=9))
def test_ranks_without_a_gpu_among_others_with_one_are_the_fault(devices):
    verdict = judge_words([Word(f"h{rank}", device) for rank, device in enumerate(devices)], on_one_host=False)
    without = tuple(rank for rank, device in enumerate(devices) if device == "cpu")
    if len(set(devices)) == 1:
        assert verdict.kind == "go"
    else:
        assert (verdict.kind, verdict.code, verdict.ranks) == ("fault", 77, without)
        assert all(f"h{rank}" in verdict.message for rank in without)


def test_machines_whose_automatic_precision_differs_are_told_to_choose_one():
    found = meet(2, {0: Word("a", precision="bf16"), 1: Word("b", precision="fp32")})
    assert isinstance(found[0], ConfigError)
    assert "bf16 on rank 0 (a), fp32 on rank 1 (b)" in str(found[0])
    assert found[1].exit_code == 78


def test_a_name_that_means_loopback_is_a_fault_only_between_hosts():
    words = [Word("node1", address="10.0.0.1"), Word("node2", address="127.0.1.1")]
    assert judge_words(words, on_one_host=True).kind == "go"
    verdict = judge_words(words, on_one_host=False)
    assert (verdict.kind, verdict.code, verdict.ranks) == ("fault", 77, (1,))
    assert "the name node2 means 127.0.1.1" in verdict.message


def test_a_rank_that_comes_after_the_request_finds_the_verdict_and_not_a_store_that_is_gone():
    store, results = HashStore(), {}
    waiting = replace(QUICK, join_s=60, should_leave=lambda: True, late_s=20)

    def first():
        try:
            call_roll(store, World(rank=0, size=2, local_size=2), Word("a"), waiting)
        except Interrupted:
            results["first left at"] = time.monotonic()

    thread = threading.Thread(target=first)
    thread.start()
    time.sleep(0.5)
    came = time.monotonic()
    with pytest.raises(Interrupted):
        call_roll(store, World(rank=1, size=2, local_rank=1, local_size=2), Word("a"), replace(QUICK, join_s=60))
    thread.join()
    assert came < results["first left at"] < came + 10
