import subprocess
import sys

import psutil
import pytest

from dstrain.base.rendezvous import loopback_store
from dstrain.base.world import World, free_port

WORKER = """
import sys, torch
from torch import distributed
from dstrain.base.rendezvous import loopback_store
from dstrain.base.world import World
rank, port = int(sys.argv[1]), int(sys.argv[2])
world = World(rank=rank, size=2, local_rank=rank, local_size=2, master_port=port)
store = loopback_store(world, timeout_s=60)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
total = torch.tensor([rank + 1.0])
distributed.all_reduce(total)
assert total.item() == 3.0
distributed.destroy_process_group()
"""


def listening():
    return {
        (c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN
    }


def test_the_store_listens_to_this_machine_only_and_works():
    port, before = free_port(), listening()
    store = loopback_store(World(size=2, local_size=2, master_port=port), timeout_s=30, environment={})
    other = loopback_store(
        World(rank=1, size=2, local_rank=1, local_size=2, master_port=port), timeout_s=30, environment={}
    )
    assert listening() - before == {("127.0.0.1", port)}
    store.set("step", "7")
    assert other.get("step") == b"7"


def test_two_ranks_join_through_it():
    port = str(free_port())
    ranks = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), port]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


def test_several_hosts_and_a_launcher_with_its_own_store_are_left_to_torch():
    assert loopback_store(World(size=4, local_size=2), timeout_s=1, environment={}) is None
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert loopback_store(World(size=2, local_size=2, launcher="torchrun"), timeout_s=1, environment=agent) is None


def test_a_port_that_is_taken_is_named():
    port = free_port()
    kept = loopback_store(World(size=2, local_size=2, master_port=port), timeout_s=5, environment={})
    with pytest.raises(RuntimeError, match=f"port {port} of this host cannot be listened on"):
        loopback_store(World(size=2, local_size=2, master_port=port), timeout_s=5, environment={})
    assert kept is not None
