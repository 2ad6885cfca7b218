"""Pairs on a ring, the slow one named, and real ranks of which one answers slowly."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.sanity_links import Expectation
from dstrain.health.sanity_network import AllReduce, Pair, judge_all_reduce, judge_pairs, ring_of, rounds_of


@given(st.integers(0, 40))
def test_every_neighbour_meets_once_and_nobody_is_in_two_pairs_at_a_time(size):
    rounds = rounds_of(size)
    pairs = [pair for found in rounds for pair in found]
    wanted = {frozenset((place, (place + 1) % size)) for place in range(size)} if size > 1 else set()
    assert Counter(map(frozenset, pairs)) == Counter(wanted)
    assert all(len({place for pair in found for place in pair}) == 2 * len(found) for found in rounds)
    assert len(rounds) <= 3


@given(st.integers(3, 20), st.data())
def test_the_slow_host_is_named_and_its_neighbours_are_not(size, data):
    slow = data.draw(st.integers(0, size - 1))
    hosts = [f"h{rank}" for rank in range(size)]
    speed = st.floats(0.9, 1.2)
    pairs = [
        Pair(a, b, data.draw(speed) * (0.05 if slow in (a, b) else 1.0)) for found in rounds_of(size) for a, b in found
    ]
    finding = judge_pairs(pairs, hosts)
    assert (finding.level, finding.ranks, finding.hosts) == ("warning", (slow,), (f"h{slow}",))


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=12))
def test_hosts_that_are_about_alike_are_left_alone(speeds):
    size = max(2, len(speeds))
    edges = [pair for found in rounds_of(size) for pair in found]
    assert (
        judge_pairs([Pair(a, b, s) for (a, b), s in zip(edges, speeds)], [f"h{rank}" for rank in range(size)]) is None
    )


def test_of_two_nobody_is_named_and_ranks_of_one_host_need_an_order_of_magnitude():
    assert judge_pairs([Pair(0, 1, 0.001)], ["a", "b"]) is None
    pairs = [Pair(0, 1, 0.2), Pair(1, 2, 0.2), Pair(2, 0, 1.0)]
    assert judge_pairs(pairs, ["a", "b", "c"]).ranks == (1,)
    assert judge_pairs(pairs, ["a", "a", "a"]) is None


def test_one_rank_of_each_host_takes_part_or_all_of_one_host():
    assert ring_of(["a", "a", "b", "b", "c"]) == [0, 2, 4]
    assert ring_of(["a", "a", "a"]) == [0, 1, 2]


def test_bandwidth_is_counted_as_on_the_wire():
    assert AllReduce(1e-4, 8_000_000, 0.01, 4).bus_gb_s == pytest.approx(1.2)
    assert AllReduce(1e-4, 8_000_000, 0.01, 2).bus_gb_s == pytest.approx(0.8)


def test_a_link_far_below_its_rate_is_said_and_an_unknown_one_never():
    found = AllReduce(1e-4, 8_000_000, 0.1, 2)
    assert judge_all_reduce(found, None, share=0.3).level == "ok"
    slow = judge_all_reduce(found, Expectation(1.0, "eth0, 10 Gb/s"), share=0.3)
    assert (slow.level, "expected about 1: eth0, 10 Gb/s" in slow.text) == ("warning", True)
    assert judge_all_reduce(found, Expectation(0.1, "eth0, 1 Gb/s"), share=0.3).level == "ok"


RANK = """
import json, os, sys, time
from pathlib import Path
from torch import distributed
from dstrain.base.control import ControlPlane
from dstrain.base.world import World
from dstrain.health.sanity_network import judge_pairs, time_all_reduce, time_pairs
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=3)
control = ControlPlane(World(rank=rank, size=3), timeout_s=60)
reduced = time_all_reduce(control, "cpu")
assert reduced.world == 3 and 0 < reduced.bus_gb_s < 1000 and 0 < reduced.latency_s < 60
if rank == 1:
    quick = distributed.send
    def send(*arguments, **named):
        time.sleep(0.5)
        return quick(*arguments, **named)
    distributed.send = send
hosts = ["a", "b", "c"]
found = judge_pairs(time_pairs(control, hosts), hosts)
(folder / f"{rank}.json").write_text(json.dumps(None if found is None else found.to_json()))
control.barrier()
os._exit(0)
"""


@pytest.mark.dist
def test_a_host_that_answers_slowly_is_named_by_real_ranks(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment) for rank in range(3)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    (found,) = {Path(tmp_path / f"{rank}.json").read_text() for rank in range(3)}
    assert (json.loads(found)["level"], json.loads(found)["hosts"]) == ("warning", ["b"])
