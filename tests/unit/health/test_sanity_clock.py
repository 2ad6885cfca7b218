"""Bounds on clocks hold whatever the network did, and a host is named by what is certain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.sanity_clock import ClockReadings, Offset, judge_clocks, of_hosts, offsets

SECONDS = st.floats(0, 2, allow_nan=False)


@st.composite
def exchanges(draw):
    """True offsets, and readings of rounds that begin when all are there and end for each when it has heard all."""
    true = draw(st.lists(st.floats(-1000, 1000), min_size=2, max_size=5))
    before, after, now = [[] for _ in true], [[] for _ in true], 0.0
    for _ in range(3):
        starts = [now + draw(SECONDS) for _ in true]
        ends = [max(starts) + draw(SECONDS) for _ in true]
        now = max(ends)
        for rank, offset in enumerate(true):
            before[rank].append(starts[rank] + offset)
            after[rank].append(ends[rank] + offset)
    return true, [ClockReadings(*pair) for pair in zip(before, after)]


@given(exchanges())
def test_the_true_offset_lies_within_the_bounds_whatever_the_delays(case):
    true, readings = case
    for real, found in zip(true, offsets(readings)):
        assert found.low - 1e-6 <= real - true[0] <= found.high + 1e-6


@given(exchanges(), st.integers(1, 5))
def test_ranks_of_a_host_share_their_bounds_and_narrow_them(case, copies):
    _, readings = case
    found = offsets(readings)
    joined = of_hosts(
        [*found, *found[1:] * copies], ["a", *"bcde"[: len(found) - 1], *list("bcde"[: len(found) - 1]) * copies]
    )
    assert all(joined[host].doubt <= offset.doubt + 1e-9 for host, offset in zip("abcde", found))


def test_the_one_clock_that_is_off_is_named_with_all_ranks_of_its_host():
    found = [Offset(0, 0), Offset(-0.001, 0.001), Offset(4.99, 5.01), Offset(5.0, 5.02)]
    finding = judge_clocks(found, ["a", "b", "c", "c"], warn_s=1.0, limit_s=60.0)
    assert (finding.level, finding.ranks, finding.hosts) == ("warning", (2, 3), ("c", "c"))
    assert "the clock of ranks 2, 3 on c is 5.00 s ahead of the others'" in finding.text
    assert judge_clocks(found, ["a", "b", "c", "c"], warn_s=1.0, limit_s=3.0).level == "failed"


def test_of_two_clocks_both_are_named_since_nobody_knows_which_is_wrong():
    finding = judge_clocks([Offset(0, 0), Offset(-3.1, -3.0)], ["a", "b"], warn_s=1.0, limit_s=None)
    assert (finding.level, finding.hosts) == ("warning", ("a", "b"))
    assert "two do not say which is wrong" in finding.text


def test_what_a_slow_network_may_explain_is_not_said():
    assert judge_clocks([Offset(0, 0), Offset(-6, 9)], ["a", "b"], warn_s=1.0, limit_s=60.0).level == "ok"
    assert (
        judge_clocks([Offset(0, 0), Offset(0, 0), Offset(-4, 9)], ["a", "b", "c"], warn_s=1.0, limit_s=60.0).level
        == "ok"
    )


RANK = """
import json, os, sys, time
from pathlib import Path
from torch import distributed
from dstrain.base.control import ControlPlane
from dstrain.base.world import World
from dstrain.health.sanity_clock import judge_clocks, offsets, read_clocks
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=3)
control = ControlPlane(World(rank=rank, size=3), timeout_s=60)
ahead = 100.0 if rank == 1 else 0.0
found = judge_clocks(offsets(read_clocks(control, clock=lambda: time.time() + ahead)), ["a", "b", "c"], warn_s=1.0, limit_s=60.0)
(folder / f"{rank}.json").write_text(json.dumps(found.to_json()))
control.barrier()
os._exit(0)
"""


@pytest.mark.dist
def test_a_skewed_clock_among_real_ranks_is_found_by_all_of_them(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment) for rank in range(3)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    findings = [json.loads(Path(tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert findings[0] == findings[1] == findings[2]
    assert (findings[0]["level"], findings[0]["ranks"]) == ("failed", [1])
    assert "100.00 s ahead" in findings[0]["text"]
