"""What a run ran on, and how many threads a rank takes."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator

import pytest
import torch

from dstrain.base.world import World
from dstrain.stages.environment import describe_environment, package_versions, set_threads


@pytest.fixture
def threads() -> Iterator[list[int]]:
    """Puts the thread count back."""
    before = torch.get_num_threads()
    yield [before]
    torch.set_num_threads(before)


def test_versions_are_those_installed() -> None:
    versions = package_versions()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert {"deepspeed", "transformers", "dstrain", "safetensors"} <= set(versions)
    assert all(versions.values())


def test_a_missing_package_is_absent_not_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert set(package_versions().values()) == {"absent"}


def test_the_description_is_json_and_knows_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    facts = describe_environment(World(size=3, launcher="srun"), device="cpu", precision="bf16")
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["world_size"], facts["launcher"], facts["slurm_job"], facts["precision"]) == (
        3,
        "srun",
        "4711",
        "bf16",
    )
    assert facts["device"] == "cpu"
    assert facts["memory_bytes"] > 1 << 20


def test_a_configured_thread_count_wins(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads(World(local_size=4), 3)
    assert torch.get_num_threads() == 3


def test_ranks_of_a_node_share_its_cores(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for ranks, expected in ((1, 6), (2, 3), (4, 1), (9, 1)):
        set_threads(World(local_size=ranks), None)
        assert torch.get_num_threads() == expected


def test_omp_num_threads_is_a_persons_word_except_where_a_launcher_wrote_it(
    threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(2)
    set_threads(World(local_size=2, launcher="python"), None)
    assert torch.get_num_threads() == 2
    set_threads(World(local_size=2, launcher="torchrun"), None)
    assert torch.get_num_threads() == 3
