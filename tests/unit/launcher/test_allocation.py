"""Allocations of SLURM: hosts and ranks from the environment, and those that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError
from dstrain.launcher.allocation import ask_gpu_types, check_gpu_types, cpus_per_rank, gpu_types, hosts_of, num_nodes
from dstrain.launcher.hosts import Host

TWO = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [({}, 0), ({"SLURM_JOB_NODELIST": "n1"}, 1), (TWO, 2), ({**TWO, "SLURM_JOB_NUM_NODES": "x"}, 1)],
)
def test_nodes_are_counted(environment: dict[str, str], nodes: int) -> None:
    assert num_nodes(environment) == nodes


@pytest.mark.parametrize(
    ("more", "processes", "slots"),
    [
        ({"SLURM_NTASKS_PER_NODE": "3"}, None, 3),
        ({"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, None, 4),
        ({"SLURM_TASKS_PER_NODE": "1(x2)"}, None, 8),
        ({"SLURM_NTASKS_PER_NODE": "3"}, 2, 1),
        ({"SLURM_GPUS_ON_NODE": "4"}, 8, 4),
    ],
)
def test_ranks_are_shared_out_evenly(more: dict[str, str], processes: int | None, slots: int) -> None:
    assert hosts_of({**TWO, **more}, processes=processes, gpus=8, on_cpu=False) == (
        Host("n1", slots),
        Host("n2", slots),
    )


def test_a_cpu_run_takes_one_rank_a_node_and_asks_for_no_gpu() -> None:
    assert hosts_of({**TWO, "SLURM_GPUS_ON_NODE": "1"}, processes=4, gpus=0, on_cpu=True)[0].slots == 2
    assert hosts_of(TWO, processes=None, gpus=0, on_cpu=True)[0].slots == 1


@pytest.mark.parametrize(
    ("environment", "processes", "message"),
    [
        ({}, None, "SLURM_JOB_NODELIST is not set"),
        (TWO, 3, "not a multiple of the 2 nodes"),
        ({**TWO, "SLURM_HET_SIZE": "2"}, None, "heterogeneous"),
        ({**TWO, "SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "4,2"}, None, "has 4,2 tasks"),
        ({**TWO, "SLURM_GPUS_ON_NODE": "4"}, 16, "8 ranks on each node and 4 GPUs.*--num-processes 8"),
        ({"SLURM_JOB_NODELIST": "n[1-2];id"}, None, "no host name"),
        ({"SLURM_JOB_NODELIST": "-x"}, None, "host"),
    ],
)
def test_an_allocation_that_cannot_be_used_is_refused(
    environment: dict[str, str], processes: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        hosts_of(environment, processes=processes, gpus=8, on_cpu=False)


@pytest.mark.parametrize(
    ("environment", "cpus"),
    [
        ({}, None),
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_CPUS_PER_NODE": "64(x2)"}, 8),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)"}, 16),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2),32,128"}, 8),
        ({"SLURM_JOB_CPUS_PER_NODE": "2"}, 1),
        ({"SLURM_JOB_CPUS_PER_NODE": "many"}, None),
        ({"SLURM_CPUS_PER_TASK": "0"}, None),
    ],
)
def test_ranks_get_the_cpus_that_srun_would_not_give_them(environment: dict[str, str], cpus: int | None) -> None:
    assert cpus_per_rank(environment, slots=4) == cpus


MIXED = """JobId=3 JobName=t.sh
   JOB_GRES=gpu:a100:4,gpu:v100:4
     Nodes=n[1-2] CPU_IDs=0-1 Mem=0 GRES=gpu:a100:2(IDX:0-1)
     Nodes=n3 CPU_IDs=0-1 Mem=0 GRES=gpu:v100:4(IDX:0-3),license:x:1
   MinCPUsNode=2 MinMemoryNode=0 MinTmpDiskNode=0
"""


def test_mixed_gpus_are_refused_with_their_nodes() -> None:
    types = gpu_types(MIXED)
    assert types == {"a100": ("n1", "n2"), "v100": ("n3",)}
    with pytest.raises(ConfigError, match=r"a100 on n1, n2; v100 on n3.*--gpus-per-node=a100:8"):
        check_gpu_types(types)


def test_one_type_and_untyped_gpus_are_taken() -> None:
    check_gpu_types(gpu_types(MIXED.replace("v100", "a100")))
    untyped = MIXED.replace("a100:", "").replace("v100:", "")
    assert gpu_types(untyped) == {}


def test_a_controller_that_does_not_answer_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_gpu_types("7") == {}
    answer = tmp_path / "scontrol"
    answer.write_text("#!/bin/sh\nexit 1\n")
    answer.chmod(0o755)
    assert ask_gpu_types("7") == {}
    answer.write_text(f"#!/bin/sh\n[ \"$*\" = 'show job --details 7' ] && /bin/cat <<'X'\n{MIXED}X\n")
    assert set(ask_gpu_types("7")) == {"a100", "v100"}
    assert ask_gpu_types("7; id") == {}
