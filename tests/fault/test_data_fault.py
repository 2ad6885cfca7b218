"""Damage that one rank meets in the middle of a run stops all ranks at the same step, with one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_data_fault_on_one_rank_is_agreed_by_all(tmp_path: Path, zygote: Zygote, prefetch: int) -> None:
    shards = build_tiny_shards(tmp_path, num_documents=60)
    run = tmp_path / "run"
    settings = pretrain_settings(shards, run, train={"max_steps": 50}, data={"prefetch_steps": prefetch})
    config = write_config(tmp_path / "run.yaml", settings)
    with zygote.start_module("tests.support.damage_worker", str(config), log_folder=tmp_path / "logs") as job:
        assert job.wait(100) == [78, 78], job.output()
        said = job.output()
    assert "Traceback" not in said
    assert said.count("block 3 is damaged") == 1
    assert sorted(step_events(run)) == [1, 2, 3, 4, 5]
    causes = [json.loads(p.read_text())["cause"] for p in sorted((run / "exit").glob("*.json"))]
    assert causes == ["rank 1: shard-000000.tar: block 3 is damaged", "shard-000000.tar: block 3 is damaged"]
