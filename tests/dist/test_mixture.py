"""Mixed sources, batch phases and stepped-over steps in real runs: the same at any world size, stage and after a kill."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dstrain.corpus.build import ShardBuildConfig, build_shards
from tests.support.runs import build_tiny_shards, pretrain_job, pretrain_settings, step_events, write_config

pytestmark = pytest.mark.dist

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of one tokenizer: the first novels, and the same text cut otherwise."""
    folder = tmp_path_factory.mktemp("mixture")
    build_tiny_shards(folder, num_documents=80)
    config = ShardBuildConfig.model_validate({"block_tokens": 512, "validation_fraction": 0.2, "seed": 5})
    build_shards(
        [str(folder / "corpus.jsonl")], tokenizer=folder / "tok", out=folder / "more", config=config, quiet=True
    )
    return folder


def settings(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    made = pretrain_settings(folder / "shards", folder / name, train={"max_steps": STEPS}, **sections)
    made["data"] = {
        "sequence_length": 48,
        "sources": [
            {"name": "novels", "path": str(folder / "shards"), "weight": 2},
            {"name": "more", "path": str(folder / "more"), "weight": 1},
        ],
        "phases": [{"from_step": 5, "global_batch": 24, "weights": {"novels": 1, "more": 1}}],
        "skip_steps": [[3, 5]],
        "lanes": 12,
    }
    return made


RUNS = {"w1": (1, 0), "w2-z0": (2, 0), "w2-z2": (2, 2), "w3-z3": (3, 3)}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    jobs = {}
    for name, (world, stage) in RUNS.items():
        config = write_config(folder / f"{name}.yaml", settings(folder, name, engine={"zero_stage": stage}))
        jobs[name] = pretrain_job(config, world_size=world)
    try:
        for job in jobs.values():
            job.succeed()
    finally:
        for job in jobs.values():
            job.signal(signal.SIGKILL)
    return {name: step_events(folder / name) for name in RUNS}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "w1"])
def test_batches_grow_alike_at_any_world_size_and_stage(runs: Any, name: str) -> None:
    alone, together = runs["w1"], runs[name]
    assert sorted(alone) == sorted(together) == list(range(1, STEPS + 1))
    for step, event in alone.items():
        assert event["rows"] - (alone[step - 1]["rows"] if step > 1 else 0) == (12 if step <= 5 else 24)
        for key in ("step_ledger", "num_targets", "tokens", "rows"):
            assert together[step][key] == event[key], (step, key)
        assert together[step]["loss"] == pytest.approx(event["loss"], abs=1e-4), step
        assert together[step]["gradient_norm"] == pytest.approx(event["gradient_norm"], rel=1e-3), step


def test_a_resume_in_the_second_phase_goes_on_bit_identically(folder: Path, runs: Any) -> None:
    copy = folder / "resumed"
    shutil.copytree(folder / "w2-z2", copy)
    (copy / "events.jsonl").unlink()
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if not checkpoint.name.endswith("8"):
            shutil.rmtree(checkpoint)
    config = write_config(folder / "resumed.yaml", settings(folder, "resumed", engine={"zero_stage": 2}))
    with pretrain_job(config, "train.resume=require", world_size=2) as job:
        job.succeed()
    found = step_events(copy)
    assert sorted(found) == [9, 10]
    for step, event in found.items():
        for key in ("loss", "gradient_norm", "ledger"):
            assert event[key] == runs["w2-z2"][step][key], (step, key)


def test_other_data_is_refused_with_the_difference_and_accepted_as_a_recorded_era(folder: Path, runs: Any) -> None:
    copy = folder / "era"
    shutil.copytree(folder / "w1", copy)
    made = settings(folder, "era")
    made["data"]["sources"][1] = {"name": "other", "path": str(folder / "more"), "weight": 1}
    made["data"]["phases"] = []
    made["train"]["max_steps"] = STEPS + 4
    config = write_config(folder / "era.yaml", made)
    with pretrain_job(config, world_size=1) as job:
        assert job.wait() == [78]
        said = job.output()
    assert "the data order changed since the checkpoint" in said
    assert "'other'" in said
    assert "--accept-new-data" in said
    for flags, last in ((["--accept-new-data"], STEPS + 4), (["train.max_steps=17"], 17)):  # the second needs no flag
        with pretrain_job(config, *flags, world_size=1) as job:
            job.succeed()
        assert max(step_events(copy)) == last
    from dstrain.checkpoint.reader import newest_valid

    found = newest_valid(copy / "checkpoints").checkpoint
    assert found is not None
    state = found.manifest.loader
    assert (state["era"], state["origin"]) == (1, STEPS)
    assert [entry["until_step"] for entry in state["history"]] == [STEPS]
    assert set(state["history"][0]["fingerprints"]) == {"more", "novels"}
