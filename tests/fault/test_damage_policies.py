"""A shard damaged on disk under a running job: `mask` and `substitute` go on with every rank in step, `fail` stops all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.data.reader import ShardDataset
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

DAMAGED = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """Shards whose rows were counted once, so that damage is met by the training, not by the counting."""
    folder = tmp_path_factory.mktemp("damage")
    shards = build_tiny_shards(folder, num_documents=80, block_tokens=512)
    with zygote.start_ranks(
        write_config(folder / "first.yaml", run_settings(shards, folder / "first")), world_size=1
    ) as job:
        job.succeed()
    return shards


def run_settings(shards: Path, run: Path, **data: Any) -> dict[str, Any]:
    return pretrain_settings(
        shards, run, train={"max_steps": 8, "evaluate_rows": 4}, data={"prefetch_steps": 1, **data},
        checkpoint={"every_steps": None},
    )  # fmt: skip


def damaged_copy(shards: Path, copy: Path, *, blocks: tuple[int, ...] = (DAMAGED,)) -> Path:
    shutil.copytree(shards, copy)
    dataset = ShardDataset(copy / "train")
    for block in blocks:
        record = dataset.blocks[block]
        path = copy / "train" / dataset.manifest.shards[int(record["shard"])].name
        data = bytearray(path.read_bytes())
        data[int(record["off"]) + 200] ^= 0x40
        path.write_bytes(data)
    return copy


@pytest.mark.parametrize("policy", ["mask", "substitute"])
def test_ranks_go_on_together_without_a_damaged_block(
    tmp_path: Path, shards: Path, policy: str, zygote: Zygote
) -> None:
    copy = damaged_copy(shards, tmp_path / "shards")
    found = {}
    for world in (1, 2):
        run = tmp_path / f"{policy}-{world}"
        settings = run_settings(copy, run, damage=policy)
        with zygote.start_ranks(write_config(run.with_suffix(".yaml"), settings), world_size=world) as job:
            job.succeed()
            assert "Traceback" not in job.output()
        found[world] = step_events(run)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        [damage] = [event for event in events if event["event"] == "damaged_block"]
        assert (damage["source"], damage["block"]) == ("train", DAMAGED)
    assert sorted(found[1]) == sorted(found[2]) == list(range(1, 9))
    rows = np.diff([0, *(found[1][step]["rows"] for step in range(1, 9))])
    assert (rows == 12).all() if policy == "substitute" else (rows < 12).any()
    for step, event in found[1].items():
        for key in ("step_ledger", "num_targets", "rows"):
            assert found[2][step][key] == event[key], (step, key)
        assert found[2][step]["loss"] == pytest.approx(event["loss"], abs=1e-4)


def test_more_damage_than_allowed_stops_every_rank_at_the_same_step(
    tmp_path: Path, shards: Path, zygote: Zygote
) -> None:
    copy = damaged_copy(shards, tmp_path / "shards", blocks=(1, 3, 5))
    settings = run_settings(copy, tmp_path / "run", damage="mask")
    with zygote.start_ranks(write_config(tmp_path / "run.yaml", settings), world_size=2) as job:
        assert job.wait() == [78, 78]
        said = job.output()
    assert "data.damage_allowance lets 1 pass" in said
    assert "Traceback" not in said


def test_failing_is_the_default(tmp_path: Path, shards: Path, zygote: Zygote) -> None:
    copy = damaged_copy(shards, tmp_path / "shards")
    with zygote.start_ranks(
        write_config(tmp_path / "run.yaml", run_settings(copy, tmp_path / "run")), world_size=2
    ) as job:
        assert job.wait() == [78, 78]
        said = job.output()
    assert f"block {DAMAGED} is damaged" in said
    assert "Traceback" not in said
