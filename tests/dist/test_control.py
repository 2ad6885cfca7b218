"""The control plane between real processes: what agreements give, and how a fault on one rank ends both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

RANK = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
from torch import distributed
from dstrain.base.control import ControlPlane
from dstrain.base.errors import DataError, DstrainError, PeerError, StorageError
from dstrain.base.peer_loss import is_peer_loss
from dstrain.base.protocols import Interrupted
from dstrain.base.world import World

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group(
    "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
control = ControlPlane(World(rank=rank, size=2), timeout_s=60)
found = {}

def attempt(name, action):
    try:
        found[name] = ["returned", control.together(action)]
    except Interrupted as error:
        found[name] = ["Interrupted", str(error)]
    except DstrainError as error:
        found[name] = [type(error).__name__, str(error), int(error.exit_code)]

def fail_if(guilty, kind=StorageError):
    def action():
        if guilty:
            raise kind(f"no room on {rank}")
        return rank
    return action

found["sum"] = control.sum([rank + 1, 2**60, -5])
found["sum_floats"] = control.sum_floats([0.5 + rank])
found["all_true"] = [control.all_true(True), control.all_true(rank == 0), control.all_true(rank == 1)]
found["gathered"] = control.gather_json({"rank": rank, "text": "ü" * (1 + 1000 * rank), "none": None})
found["first"] = control.from_first({"from": rank})
attempt("nobody fails", fail_if(False))
attempt("second fails", fail_if(rank == 1))
attempt("first fails", fail_if(rank == 0, DataError))
attempt("both fail", fail_if(True))
def leave_if(leaving, otherwise):
    def action():
        if leaving:
            raise Interrupted(f"asked on {rank}")
        return otherwise()
    return action

attempt("second leaves", leave_if(rank == 1, lambda: rank))
attempt("second leaves, first fails", leave_if(rank == 1, fail_if(True)))
control.store.set("word", "here")
control.barrier()
found["store"] = control.store.check(["word"])
found["still works"] = control.sum([1])
control.barrier()
if rank == 0:
    try:
        control.sum([1])  # the other one is gone, or goes now
    except RuntimeError as error:
        found["lost"] = is_peer_loss(error)
(folder / f"{rank}.json").write_text(json.dumps(found))
os._exit(0)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    return [json.loads(Path(folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_sums_are_exact_and_equal_on_both_ranks(found):
    for rank in found:
        assert rank["sum"] == [3, 2**61, -10]
        assert rank["sum_floats"] == [2.0]
        assert rank["still works"] == [2]


def test_all_true_needs_every_rank(found):
    assert [rank["all_true"] for rank in found] == [[True, False, False]] * 2


def test_values_of_different_sizes_are_gathered_in_rank_order(found):
    expected = [{"rank": r, "text": "ü" * (1 + 1000 * r), "none": None} for r in range(2)]
    assert [rank["gathered"] for rank in found] == [expected] * 2


def test_the_first_ranks_value_reaches_all(found):
    assert [rank["first"] for rank in found] == [{"from": 0}] * 2


def test_each_rank_keeps_its_own_result_when_nobody_fails(found):
    assert [rank["nobody fails"] for rank in found] == [["returned", 0], ["returned", 1]]


@pytest.mark.parametrize(
    ("case", "guilty", "kind", "code"), [("second fails", 1, "StorageError", 76), ("first fails", 0, "DataError", 78)]
)
def test_the_guilty_rank_raises_its_fault_and_the_other_leaves_with_the_same_code(found, case, guilty, kind, code):
    assert found[guilty][case] == [kind, f"no room on {guilty}", code]
    assert found[1 - guilty][case] == ["PeerError", f"rank {guilty}: no room on {guilty}", code]


def test_when_both_fail_the_first_speaks(found):
    assert found[0]["both fail"] == ["StorageError", "no room on 0", 76]
    assert found[1]["both fail"] == ["PeerError", "rank 0: no room on 0", 76]


def test_a_rank_whose_peer_has_gone_is_told_so_by_an_error_that_is_known_for_it(found):
    assert found[0]["lost"] is True


def test_a_rank_that_was_asked_to_stop_takes_the_others_along_unless_one_has_a_fault(found):
    assert [rank["second leaves"] for rank in found] == [["Interrupted", "asked on 1"]] * 2
    assert found[0]["second leaves, first fails"] == ["StorageError", "no room on 0", 76]
    assert found[1]["second leaves, first fails"] == ["PeerError", "rank 0: no room on 0", 76]


def test_ranks_share_the_store_that_they_met_at(found):
    assert [rank["store"] for rank in found] == [True, True]
