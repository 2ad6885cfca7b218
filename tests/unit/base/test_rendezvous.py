import subprocess
import sys
import threading
import time

import psutil
import pytest

from dstrain.base.errors import PeerGoneError
from dstrain.base.protocols import Interrupted
from dstrain.base.rendezvous import open_store
from dstrain.base.world import World, free_port

WORKER = """
import sys, torch
from torch import distributed
from dstrain.base.rendezvous import open_store
from dstrain.base.world import World
rank, port = int(sys.argv[1]), int(sys.argv[2])
world = World(rank=rank, size=2, local_rank=rank, local_size=2, master_port=port)
store = open_store(world, join_s=60, timeout_s=60)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
total = torch.tensor([rank + 1.0])
distributed.all_reduce(total)
assert total.item() == 3.0
distributed.destroy_process_group()
"""


def second(port):
    return World(rank=1, size=2, local_rank=1, local_size=2, master_port=port)


def listening():
    return {
        (c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN
    }


def test_the_store_listens_to_this_machine_only_and_works():
    port, before = free_port(), listening()
    store = open_store(World(size=2, local_size=2, master_port=port), join_s=30, timeout_s=30, environment={})
    other = open_store(second(port), join_s=30, timeout_s=30, environment={})
    assert listening() - before == {("127.0.0.1", port)}
    store.set("step", "7")
    assert other.get("step") == b"7"


def test_two_ranks_join_through_it():
    port = str(free_port())
    ranks = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), port]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


def test_under_torchrun_the_first_rank_is_a_guest_too():
    port = free_port()
    kept = open_store(World(size=2, local_size=2, master_port=port), join_s=5, timeout_s=5, environment={})
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    world = World(size=2, local_size=2, master_port=port, launcher="torchrun")
    guest = open_store(world, join_s=5, timeout_s=5, environment=agent)
    guest.set("who", "rank 0")
    assert kept.get("who") == b"rank 0"


def test_a_port_that_is_taken_is_named():
    port = free_port()
    kept = open_store(World(size=2, local_size=2, master_port=port), join_s=5, timeout_s=5, environment={})
    with pytest.raises(RuntimeError, match=f"port {port} of this host cannot be listened on"):
        open_store(World(size=2, local_size=2, master_port=port), join_s=5, timeout_s=5, environment={})
    assert kept is not None


def test_a_first_rank_that_does_not_start_is_told_from_a_name_that_is_not_known():
    with pytest.raises(
        PeerGoneError, match=r"rank 0 did not answer at 127\.0\.0\.1:\d+ within 0\.2 s: its host is there, but"
    ):
        open_store(second(free_port()), join_s=0.2, timeout_s=5, environment={})
    elsewhere = World(rank=1, size=2, local_size=1, master_addr="no-such-host.invalid", master_port=1)
    with pytest.raises(PeerGoneError, match=r"no-such-host\.invalid:1 .*its name is not known here"):
        open_store(elsewhere, join_s=0.2, timeout_s=5, environment={})


def test_a_request_to_stop_ends_the_wait_for_the_first_rank():
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="while waiting for the other ranks"):
        open_store(
            second(free_port()),
            join_s=60,
            timeout_s=60,
            should_leave=lambda: next(asked),
            last_word_s=0.2,
            environment={},
        )


def test_a_rank_that_is_asked_to_stop_before_the_first_one_listens_stays_to_tell_it():
    """Seen in continuous integration: it left in silence, and rank 0 waited for it until `start.join_s` was over."""
    port, first = free_port(), []

    def late():
        time.sleep(0.5)
        first.append(open_store(World(size=2, local_size=2, master_port=port), join_s=5, timeout_s=5, environment={}))

    thread = threading.Thread(target=late)
    thread.start()
    store = open_store(second(port), join_s=60, timeout_s=60, should_leave=lambda: True, environment={})
    thread.join()
    store.set("word", "asked to stop")
    assert first[0].get("word") == b"asked to stop"
