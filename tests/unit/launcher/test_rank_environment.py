"""A rank's threads, cores, interfaces and caches: for every launcher, as a pure function and as taken up by a process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.base.rank_settings import RankSettings
from dstrain.base.world import INTERFACE_VARIABLES, World
from dstrain.launcher.node_view import Cpu, NodeView
from dstrain.launcher.rank_environment import (
    CACHES,
    NODE_CPUS,
    OWN_THREADS,
    THREAD_VARIABLES,
    describe,
    ranges,
    rank_environment,
    route_to,
)


def machine(nodes: int, cores: int, threads: int, gpu_nodes: tuple[int, ...] = ()) -> NodeView:
    """`cores` a NUMA node, `threads` a core; numbered thread by thread as Linux does."""
    total = nodes * cores
    cpus = [Cpu(c // cores, c // cores, c, c + total * t) for c in range(total) for t in range(threads)]
    return NodeView(tuple(sorted(cpus)), gpu_nodes, ("eth0", "ib0", "lo"), Path("/scratch/dstrain-1/python-torch"))


def found(node: NodeView, *, rank: int = 0, ranks: int = 1, launcher: str = "deepspeed", settings: RankSettings | None = None,
          environment: dict[str, str] | None = None, route: str | None = None, hosts: int = 1):  # fmt: skip
    world = World(rank=rank, size=ranks * hosts, local_rank=rank, local_size=ranks, launcher=launcher)
    return rank_environment(settings or RankSettings(), world, node, environment or {}, route=route)


def in_job(cpus: int, **more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": str(cpus), **more}


@pytest.mark.parametrize(("ranks", "threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
@pytest.mark.parametrize("launcher", ["python", "deepspeed", "torchrun", "srun", "environment"])
def test_ranks_of_a_node_share_its_physical_cores(launcher: str, ranks: int, threads: int) -> None:
    rank = found(machine(1, 8, 2), ranks=ranks, launcher=launcher)
    assert rank.threads == threads
    assert {rank.variables[name] for name in THREAD_VARIABLES} == {str(threads)}


def test_a_configured_count_wins_over_all() -> None:
    assert found(machine(1, 8, 1), settings=RankSettings(threads=3), environment={"OMP_NUM_THREADS": "1"}).threads == 3


@pytest.mark.parametrize(("launcher", "threads"), [("python", 2), ("srun", 2), ("torchrun", 4), ("deepspeed", 4)])
def test_omp_num_threads_is_a_persons_word_except_where_a_launcher_may_have_written_it(
    launcher: str, threads: int
) -> None:
    environment = {"OMP_NUM_THREADS": "2"}
    assert found(machine(1, 8, 1), ranks=2, launcher=launcher, environment=environment).threads == threads
    assert (
        found(machine(1, 8, 1), ranks=2, environment={**environment, OWN_THREADS: "2"}, launcher="python").threads == 4
    )


def test_a_machine_that_others_may_use_is_not_bound_unless_asked() -> None:
    node = machine(1, 8, 1)
    assert found(node, ranks=2).cpus is None
    assert found(node, rank=1, ranks=2, settings=RankSettings(bind="cores")).cpus == (4, 5, 6, 7)
    assert found(node, rank=1, ranks=2, environment=in_job(8), launcher="srun").cpus == (4, 5, 6, 7)
    assert found(node, rank=1, ranks=2, environment=in_job(8), settings=RankSettings(bind="none")).cpus is None


def test_in_a_job_that_has_part_of_a_machine_without_cgroups_nothing_is_bound_and_threads_are_the_jobs() -> None:
    rank = found(machine(1, 64, 1), ranks=2, environment=in_job(8), launcher="srun")
    assert (rank.cpus, rank.threads) == (None, 4)


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        ("srun", in_job(16)),
        ("srun", in_job(8, SLURM_CPU_BIND_LIST="0xF,0xF0")),
        ("deepspeed", {"OMP_NUM_THREADS": "8"}),
    ],
)
def test_cores_that_a_launcher_gave_to_one_rank_are_not_shared_out_again(
    launcher: str, environment: dict[str, str]
) -> None:
    rank = found(machine(1, 8, 1), rank=1, ranks=2, launcher=launcher, environment=environment)
    assert (rank.cpus, rank.threads) == (None, 8)


def test_ranks_sit_beside_their_gpus() -> None:
    node = machine(2, 4, 2, gpu_nodes=(1, 1, 0, 0))
    cores = [found(node, rank=r, ranks=4, settings=RankSettings(bind="cores")).cpus for r in range(4)]
    assert cores == [(4, 5, 12, 13), (6, 7, 14, 15), (0, 1, 8, 9), (2, 3, 10, 11)]
    whole = [found(node, rank=r, ranks=4) for r in range(4)]
    assert [rank.cpus for rank in whole] == [(4, 5, 6, 7, 12, 13, 14, 15)] * 2 + [(0, 1, 2, 3, 8, 9, 10, 11)] * 2
    assert {rank.threads for rank in whole} == {2}


@given(
    nodes=st.integers(1, 4),
    cores=st.integers(1, 12),
    threads=st.integers(1, 2),
    ranks=st.integers(1, 16),
    data=st.data(),
)
def test_shares_are_whole_cores_of_nobody_else_and_leave_none_out(
    nodes: int, cores: int, threads: int, ranks: int, data: st.DataObject
) -> None:
    gpus = data.draw(st.one_of(st.just(()), st.lists(st.integers(0, nodes - 1), min_size=ranks, max_size=ranks)))
    node = machine(nodes, cores, threads, tuple(gpus))
    shares = [found(node, rank=r, ranks=ranks, settings=RankSettings(bind="cores")) for r in range(ranks)]
    taken = [number for share in shares for number in share.cpus or ()]
    assert len(taken) == len(set(taken))
    for share in shares:
        if share.cpus is not None:
            total = nodes * cores
            assert {(n + total * t) % (total * threads) for n in share.cpus for t in range(threads)} == set(share.cpus)
            assert share.threads <= max(1, len(share.cpus) // threads)
    if not gpus and ranks <= nodes * cores:
        assert len(taken) == nodes * cores * threads
        sizes = {len(share.cpus or ()) for share in shares}
        assert max(sizes) - min(sizes) <= threads


def test_the_interface_is_loopback_the_route_or_the_configured_one() -> None:
    node = machine(1, 4, 1)
    names = {name: found(node).variables.get(name) for name in INTERFACE_VARIABLES}
    assert names == dict.fromkeys(INTERFACE_VARIABLES, "lo")
    far = found(node, hosts=2, route="eth0")
    assert {name: far.variables.get(name) for name in INTERFACE_VARIABLES} == {
        "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": None,
    }  # fmt: skip
    chosen = found(node, hosts=2, route="eth0", settings=RankSettings(interface="ib0"))
    assert {chosen.variables[name] for name in INTERFACE_VARIABLES} == {"ib0"}
    assert set(INTERFACE_VARIABLES) <= chosen.forced


def test_a_missing_interface_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"engine.interface: 'ib7' does not exist on .*: it has eth0, ib0, lo"):
        found(machine(1, 4, 1), settings=RankSettings(interface="ib7"))


def test_compiled_things_go_to_the_scratch_folder_or_the_configured_one() -> None:
    node = machine(1, 4, 1)
    assert {Path(found(node).variables[name]).parent for name in CACHES} == {node.scratch}
    own = found(node, settings=RankSettings(compile_cache=Path("/fast")))
    assert own.variables["TRITON_CACHE_DIR"] == "/fast/triton"
    assert set(CACHES) <= own.forced


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    text = ranges(tuple(numbers))
    pairs = [(int(low), int(high or low)) for low, _, high in (part.partition("-") for part in text.split(","))]
    assert [n for low, high in pairs for n in range(low, high + 1)] == sorted(numbers)


def test_the_route_to_this_host_is_an_interface_of_its_own_and_one_host_needs_none() -> None:
    assert route_to(World(size=2, local_size=2)) is None
    own = route_to(World(size=2, local_size=1, master_addr=socket.gethostname()))
    assert own is None or own in {name for _, name in socket.if_nameindex()} - {"lo"}
    assert route_to(World(size=2, local_size=1, master_addr="no-such-host.invalid")) is None


def test_a_description_is_one_line() -> None:
    rank = found(machine(1, 8, 1), rank=1, ranks=2, settings=RankSettings(bind="cores"))
    assert describe(rank) == "4 threads, cores 4-7 (its own), interface lo"


_PROBE = """
import json, os, sys
from dstrain.base.rank_settings import RankSettings
from dstrain.base.world import world_from_environment
from dstrain.launcher.rank_environment import take_up
first = take_up(RankSettings(bind=sys.argv[1]), world_from_environment(), os.environ)
then = take_up(RankSettings(bind=sys.argv[1]), world_from_environment(), os.environ)
names = [n for n in os.environ if n.endswith(("_DIR", "THREADS", "IFNAME", "_CPUS"))]
print(json.dumps([sorted(os.sched_getaffinity(0)), first == then, 'torch' in sys.modules, {n: os.environ[n] for n in names}]))
"""


def taken_up(scratch: Path, bind: str, **environment: str):
    inherited = {
        n: v
        for n, v in os.environ.items()
        if n not in (*CACHES, *THREAD_VARIABLES, *INTERFACE_VARIABLES, NODE_CPUS, OWN_THREADS)
    }
    ranks = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "0",
        "TMPDIR": str(scratch),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, bind], env={**inherited, **ranks, **environment}, capture_output=True, text=True, check=True
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_process_binds_itself_once_and_leaves_torch_alone(tmp_path: Path) -> None:
    (cpus, same, torch, variables), _ = taken_up(tmp_path, "cores")
    allowed = os.sched_getaffinity(0)
    assert set(cpus) < allowed
    assert (same, torch) == (True, False)
    assert variables[NODE_CPUS] == ranges(tuple(allowed))
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert variables["TRITON_CACHE_DIR"].startswith(str(tmp_path / f"dstrain-{os.geteuid()}"))
    assert (tmp_path / f"dstrain-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


def test_what_a_person_has_set_stays(tmp_path: Path) -> None:
    (cpus, _, _, variables), _ = taken_up(tmp_path, "none", TRITON_CACHE_DIR="/mine", NCCL_SOCKET_IFNAME="ib0")
    assert set(cpus) == os.sched_getaffinity(0)
    assert (variables["TRITON_CACHE_DIR"], variables["NCCL_SOCKET_IFNAME"]) == ("/mine", "ib0")
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("trap", ["link", "open to all"])
def test_a_cache_that_others_could_write_to_is_not_used(tmp_path: Path, trap: str) -> None:
    place = tmp_path / f"dstrain-{os.geteuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    (_, _, _, variables), said = taken_up(tmp_path, "none")
    assert not set(CACHES) & set(variables)
    assert "not a folder of this user alone" in said
