"""A run of two ranks with histograms: of whole tensors, wherever ZeRO keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import build_tiny_shards, pretrain_job, pretrain_settings, write_config

pytestmark = pytest.mark.dist


def _run(folder: Path, shards: Path, *, world_size: int, **sections: Any) -> Path:
    settings = pretrain_settings(shards, folder / "run", **{"train": {"max_steps": 4}, **sections})
    with pretrain_job(write_config(folder / "run.yaml", settings), world_size=world_size) as job:
        job.succeed()
    return folder / "run"


def _histograms(run: Path) -> dict[str, list[tuple[int, dict[float, float]]]]:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    accumulator.Reload()
    return {
        name: [
            (e.step, {limit: n for limit, n in zip(e.histogram_value.bucket_limit, e.histogram_value.bucket) if n})
            for e in accumulator.Histograms(name)
        ]
        for name in accumulator.Tags()["histograms"]
    }


def test_two_ranks_draw_the_histograms_of_one(tmp_path: Path) -> None:
    shards = build_tiny_shards(tmp_path)
    looking = {"monitor": {"tensorboard": True, "histograms_every": 2}}
    alone = _histograms(_run(tmp_path / "alone", shards, world_size=1, **looking))
    assert {step for points in alone.values() for step, _ in points} == {2, 4}
    for stage in (1, 3):
        run = _run(tmp_path / f"two-{stage}", shards, world_size=2, engine={"zero_stage": stage}, **looking)
        found = _histograms(run)
        assert found.keys() == alone.keys()
        for name, points in found.items():
            assert [(step, sum(counts.values())) for step, counts in points] == [
                (step, sum(counts.values())) for step, counts in alone[name]
            ], name
