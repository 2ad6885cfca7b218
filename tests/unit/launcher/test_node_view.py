"""What is read of a machine: from made-up /sys and /proc trees of known machines, and from this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dstrain.launcher.node_view import Cpu, cores_of, interfaces, look_at_node


def make_machine(folder: Path, cpus: list[tuple[int, int, int, int]], gpus: dict[str, int] | None = None) -> None:
    """A tree of (number, node, socket, core), and of GPUs by bus address with their NUMA node."""
    for number, node, socket, core in cpus:
        place = folder / f"sys/devices/system/cpu/cpu{number}"
        (place / "topology").mkdir(parents=True)
        (place / f"node{node}").mkdir()
        (place / "topology/physical_package_id").write_text(f"{socket}\n")
        (place / "topology/core_id").write_text(f"{core}\n")
    for address, node in (gpus or {}).items():
        (folder / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        device = folder / "sys/bus/pci/devices" / address.lower()
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")


TWO_SOCKETS = [
    (0, 0, 0, 0),
    (1, 1, 1, 0),
    (2, 0, 0, 1),
    (3, 1, 1, 1),
    (4, 0, 0, 0),
    (5, 1, 1, 0),
    (6, 0, 0, 1),
    (7, 1, 1, 1),
]
"""Cores numbered across sockets, with a second thread each: what `lscpu -e` shows of many servers."""
GPUS = {"0000:C1:00.0": 1, "0000:07:00.0": 0, "0000:0A:00.0": 0, "0000:D0:00.0": 1}


def look(folder: Path, environment: dict[str, str] | None = None, allowed: set[int] | None = None):
    return look_at_node(
        environment or {}, allowed=set(range(8)) if allowed is None else allowed,
        sys_folder=folder / "sys", proc_folder=folder / "proc",
    )  # fmt: skip


def test_siblings_and_nodes_are_together(tmp_path: Path) -> None:
    make_machine(tmp_path, TWO_SOCKETS)
    view = look(tmp_path)
    assert [cpu.number for cpu in view.cpus] == [0, 4, 2, 6, 1, 5, 3, 7]
    assert view.cores == 4
    assert [[cpu.number for cpu in core] for core in cores_of(view.cpus)] == [[0, 4], [2, 6], [1, 5], [3, 7]]


def test_only_what_this_process_may_use_is_seen(tmp_path: Path) -> None:
    make_machine(tmp_path, TWO_SOCKETS)
    assert look(tmp_path, allowed={0, 1, 4}).cpus == (Cpu(0, 0, 0, 0), Cpu(0, 0, 0, 4), Cpu(1, 1, 0, 1))
    assert look(tmp_path, allowed={0, 1, 4}).cores == 2


def test_without_a_topology_every_thread_is_a_core(tmp_path: Path) -> None:
    assert look(tmp_path, allowed={0, 1, 2}).cores == 3


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({}, (0, 0, 1, 1)),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, (1, 0)),
        ({"SLURM_STEP_GPUS": "3", "CUDA_VISIBLE_DEVICES": "0"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1234"}, ()),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "9"}, ()),
    ],
)
def test_gpus_are_at_the_nodes_of_their_bus_addresses(
    tmp_path: Path, environment: dict[str, str], nodes: tuple[int, ...]
) -> None:
    make_machine(tmp_path, TWO_SOCKETS, GPUS)
    assert look(tmp_path, environment).gpu_nodes == nodes


def test_a_machine_that_does_not_say_leaves_the_gpus_nodes_unknown(tmp_path: Path) -> None:
    make_machine(tmp_path, TWO_SOCKETS, {"0000:00:05.0": -1})
    assert look(tmp_path).gpu_nodes == ()


def test_this_machine_can_be_looked_at() -> None:
    view = look_at_node(os.environ)
    assert {cpu.number for cpu in view.cpus} == os.sched_getaffinity(0)
    assert 1 <= view.cores <= len(view.cpus)
    assert "lo" in view.interfaces == interfaces()
    assert str(os.geteuid()) in view.scratch.parent.name
    assert "torch" in view.scratch.name
