"""Ranks of two hosts as threads around a real store: who tells a fault, and that nobody waits for one that has left."""

from __future__ import annotations

import threading
import time

import pytest

from dstrain.base.early_fault import tell
from dstrain.base.errors import ConfigError, DstrainError, PeerError, StorageError
from dstrain.base.rendezvous import open_store
from dstrain.base.roll_call import Waiting, Word, call_roll
from dstrain.base.world import World, free_port


def host(rank: int, port: int) -> World:
    return World(rank=rank, size=2, local_size=1, master_port=port)


def sound(world: World) -> DstrainError | None:
    """What a rank without a fault hears."""
    try:
        call_roll(open_store(world, join_s=60, timeout_s=60, environment={}), world, Word("sound"), Waiting(60))
    except DstrainError as error:
        return error
    return None


def together(*ranks):
    found: list[DstrainError | None] = [None] * len(ranks)

    def run(number: int) -> None:
        found[number] = ranks[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(ranks))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert time.monotonic() - started < 30
    return found


def test_the_other_host_hears_of_rank_0s_fault_and_rank_0_says_it_as_it_was():
    port, fault = free_port(), StorageError("/run: no")
    first, second = together(lambda: tell(fault, host(0, port), meet_s=20), lambda: sound(host(1, port)))
    assert first is fault
    assert isinstance(second, PeerError)
    assert (second.exit_code, "/run: no" in str(second)) == (76, True)


@pytest.mark.parametrize("fault", [ConfigError("a.yaml: no such file"), StorageError("/run: no")])
def test_rank_0_hears_of_the_other_hosts_fault_and_that_one_says_where(fault: DstrainError):
    port = free_port()
    first, second = together(lambda: sound(host(0, port)), lambda: tell(fault, host(1, port), meet_s=20))
    assert isinstance(first, PeerError)
    assert first.exit_code == fault.exit_code
    assert type(second) is type(fault)
    assert str(second).startswith("rank 1 on ")
    assert str(second).endswith(str(fault))


def test_of_many_that_have_the_same_fault_rank_0_says_it():
    port, faults = free_port(), [ConfigError("a"), ConfigError("a")]
    first, second = together(*(lambda r=rank: tell(faults[r], host(r, port), meet_s=20) for rank in range(2)))
    assert first is faults[0]
    assert isinstance(second, PeerError)
    assert second.exit_code == 78


@pytest.mark.parametrize("rank", [0, 1])
def test_where_nobody_comes_the_rank_leaves_with_its_own_fault_after_a_while(rank: int):
    fault = ConfigError("a")
    assert tell(fault, host(rank, free_port()), meet_s=0.5) is fault
    assert tell(fault, host(rank, free_port()), meet_s=0.5, should_leave=lambda: rank == 0) is fault
