"""What a run ran on."""

from __future__ import annotations

import importlib.metadata
import json
import os

import pytest

from dstrain.base.world import World
from dstrain.launcher.rank_environment import ranges
from dstrain.stages.environment import describe_environment, package_versions


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
    assert facts["affinity"] == ranges(tuple(os.sched_getaffinity(0)))
    assert facts["memory_bytes"] > 1 << 20
