"""The same run at 1, 2 and 3 processes, and across a kill: same rows, same masks, same losses."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import build_tiny_shards, pretrain_job, pretrain_settings, step_events, wait_for, write_config

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def run(folder: Path, shards: Path, *, world_size: int, name: str, **sections: Any) -> dict[int, dict[str, Any]]:
    config = write_config(folder / f"{name}.yaml", pretrain_settings(shards, folder / name, **sections))
    with pretrain_job(config, world_size=world_size) as job:
        job.succeed()
    return step_events(folder / name)


@pytest.fixture(scope="module")
def by_world(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, dict[int, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("worlds")
    configs = {
        w: write_config(
            folder / f"w{w}.yaml", pretrain_settings(shards, folder / f"w{w}", checkpoint={"every_steps": None})
        )
        for w in (1, 2, 3)
    }
    jobs = {w: pretrain_job(configs[w], world_size=w) for w in (1, 2, 3)}
    try:
        for job in jobs.values():
            job.succeed()
    finally:
        for job in jobs.values():
            job.signal(signal.SIGKILL)
    return {w: step_events(folder / f"w{w}") for w in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
def test_every_step_trains_on_the_same_rows_and_masks_at_any_world_size(by_world: Any, world: int) -> None:
    alone, together = by_world[1], by_world[world]
    assert list(alone) == list(together) == list(range(1, 13))
    for step in alone:
        for key in ("step_ledger", "ledger", "num_targets", "tokens", "rows"):
            assert alone[step][key] == together[step][key], (step, key)


@pytest.mark.parametrize("world", [2, 3])
def test_losses_agree_at_any_world_size_in_fp32(by_world: Any, world: int) -> None:
    for step, event in by_world[1].items():
        assert by_world[world][step]["loss"] == pytest.approx(event["loss"], abs=1e-4), step
    losses = [by_world[1][s]["loss"] for s in (1, 12)]
    assert losses[1] < losses[0], "twelve steps must have learnt something, or equal losses prove nothing"


KILLED = {
    "model": {"config": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}},
    "train": {"max_steps": 40},
    "checkpoint": {"every_steps": 3},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """An undisturbed 2-process run in `whole`, and a run folder killed without warning in the middle in `killed`."""
    folder = tmp_path_factory.mktemp("killed")
    whole = write_config(folder / "whole.yaml", pretrain_settings(shards, folder / "whole", **KILLED))
    config = write_config(folder / "killed.yaml", pretrain_settings(shards, folder / "killed", **KILLED))
    with pretrain_job(whole, world_size=2) as undisturbed, pretrain_job(config, world_size=2) as job:
        wait_for(lambda: max(step_events(folder / "killed"), default=0) >= 10, job=job)
        job.signal(signal.SIGKILL)
        assert set(job.wait()) == {-signal.SIGKILL}
        undisturbed.succeed()
    return folder


@pytest.fixture(scope="module")
def resumed(killed: Path, shards: Path) -> dict[int, dict[int, dict[str, Any]]]:
    """The killed run, resumed at 1, 2 and 3 processes from copies of its folder."""
    jobs = {}
    for world in (1, 2, 3):
        copy = killed / f"resumed-{world}"
        shutil.copytree(killed / "killed", copy)
        (copy / "events.jsonl").unlink()
        (copy / "lease.json").unlink(missing_ok=True)
        config = write_config(killed / f"resumed-{world}.yaml", pretrain_settings(shards, copy, **KILLED))
        jobs[world] = pretrain_job(config, "train.resume=require", world_size=world)
    try:
        for job in jobs.values():
            job.succeed()
    finally:
        for job in jobs.values():
            job.signal(signal.SIGKILL)
    return {world: step_events(killed / f"resumed-{world}") for world in jobs}


def test_a_killed_run_resumed_at_the_same_world_size_is_bit_identical(killed: Path, resumed: Any) -> None:
    whole = step_events(killed / "whole")
    assert 4 <= min(resumed[2]) <= 34, "the resume must start from a checkpoint in the middle"
    assert max(resumed[2]) == 40
    for step, event in resumed[2].items():
        for key in ("loss", "accuracy", "gradient_norm", "step_ledger", "ledger"):
            assert event[key] == whole[step][key], (step, key)


@pytest.mark.parametrize("world", [1, 3])
def test_a_killed_run_resumed_at_another_world_size_goes_on_with_the_same_rows_and_masks(
    killed: Path, resumed: Any, world: int
) -> None:
    whole = step_events(killed / "whole")
    assert max(resumed[world]) == 40
    for step, event in resumed[world].items():
        assert (event["step_ledger"], event["ledger"]) == (whole[step]["step_ledger"], whole[step]["ledger"]), step
