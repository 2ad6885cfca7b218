"""All that makes learning cheaper at once: the same data as without, the same masks at every world size, bit-identical resume."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.base.errors import ExitCode
from dstrain.checkpoint.reader import Checkpoint
from dstrain.models.huggingface import load_folder_weights
from dstrain.stages.export import export_run
from tests.support.runs import Job, build_tiny_shards, pretrain_job, pretrain_settings, step_events, write_config

pytestmark = pytest.mark.dist

MODEL = {
    "model_type": "modernbert", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
SWITCHES: dict[str, Any] = {
    "optimizer": {"kind": "muon"},
    "schedule": {"kind": "wsd", "decay_steps": 4, "decay_shape": "one_minus_sqrt"},
    "token_dropping": {"first_share": 0.4, "steps": 10, "increments": 5},
    "layer_dropping": {"last_keep": 0.3, "gamma": 0.5},
    "data": {"segment_warmup": {"first_length": 8, "until_tokens": 4000}},
    "checkpoint": {"every_steps": 2, "keep_last": 10},
}
SAME_DATA = ("step_ledger", "ledger", "num_targets", "tokens", "rows")


def settings(shards: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    found = pretrain_settings(shards, folder, **sections)
    return {**found, "model": {"config": MODEL}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without switches at 1 process; with all of them whole at 2 and 1, stopped by a budget of tokens at 2."""
    folder = tmp_path_factory.mktemp("learning")
    shards = build_tiny_shards(folder)
    sections: dict[str, tuple[int, dict[str, Any]]] = {
        "plain": (1, {}), "alone": (1, SWITCHES), "whole": (2, SWITCHES),
        "stopped": (2, {**SWITCHES, "stop": {"max_tokens": 2500}}),
    }  # fmt: skip
    jobs = {}
    for name, (world_size, some) in sections.items():
        config = write_config(folder / f"{name}.yaml", settings(shards, folder / name, **some))
        jobs[name] = pretrain_job(config, world_size=world_size)
    try:
        for name, job in jobs.items():
            expected = ExitCode.SAVED_END if name == "stopped" else 0
            assert set(job.wait()) == {expected}, job.output()
    finally:
        for job in jobs.values():
            job.signal(signal.SIGKILL)
    return folder


@pytest.fixture(scope="module")
def resumed(runs: Path) -> dict[int, dict[int, dict[str, Any]]]:
    """The stopped run, gone on with at 1 and at 2 processes (and stage 2) in copies of its folder."""
    jobs = {}
    for world_size in (1, 2):
        copy = runs / f"resumed-{world_size}"
        shutil.copytree(runs / "stopped", copy)
        (copy / "events.jsonl").unlink()
        some = {**SWITCHES, **({"engine": {"zero_stage": 2}} if world_size == 1 else {})}
        config = write_config(runs / f"resumed-{world_size}.yaml", settings(runs / "shards", copy, **some))
        jobs[world_size] = pretrain_job(config, "train.resume=require", world_size=world_size)
    try:
        for job in jobs.values():
            job.succeed()
    finally:
        for job in jobs.values():
            job.signal(signal.SIGKILL)
    return {world_size: step_events(runs / f"resumed-{world_size}") for world_size in jobs}


def test_no_switch_changes_what_is_trained_on(runs: Path) -> None:
    plain = step_events(runs / "plain")
    for name in ("alone", "whole"):
        found = step_events(runs / name)
        assert list(found) == list(plain) == list(range(1, 13))
        for step, event in found.items():
            assert [event[key] for key in SAME_DATA] == [plain[step][key] for key in SAME_DATA], (name, step)
        assert found[3]["loss"] != plain[3]["loss"], "the switches must have done something"


def test_the_same_tokens_and_layers_are_left_out_at_every_world_size(runs: Path) -> None:
    alone, whole = step_events(runs / "alone"), step_events(runs / "whole")
    for step, event in alone.items():
        assert whole[step]["loss"] == pytest.approx(event["loss"], abs=2e-4), step
        assert whole[step]["learning_rate"] == event["learning_rate"]
    assert alone[12]["loss"] < alone[1]["loss"]


def test_a_resume_is_bit_identical(runs: Path, resumed: Any) -> None:
    whole = step_events(runs / "whole")
    assert 3 <= min(resumed[2]) <= 10, "the run must have been stopped in the middle"
    assert max(resumed[2]) == 12
    for step, event in resumed[2].items():
        for key in ("loss", "accuracy", "gradient_norm", "learning_rate", "ledger"):
            assert event[key] == whole[step][key], (step, key)


def test_a_resume_at_another_world_size_and_stage_goes_on_alike(runs: Path, resumed: Any) -> None:
    whole = step_events(runs / "whole")
    for step, event in resumed[1].items():
        assert event["ledger"] == whole[step]["ledger"]
        assert event["loss"] == pytest.approx(whole[step]["loss"], abs=2e-4)


def test_the_mean_of_the_last_checkpoints_is_exported(runs: Path, tmp_path: Path) -> None:
    report = export_run(runs / "whole", tmp_path / "hf", average="last:3")
    assert report.step == 12
    exported = load_folder_weights(tmp_path / "hf")
    name = "model.layers.1.attn.Wqkv.weight"
    steps = [Checkpoint(runs / f"whole/checkpoints/step-{step:08d}").tensors()[name] for step in (8, 10, 12)]
    torch.testing.assert_close(exported[name], torch.stack(steps).mean(dim=0), rtol=1e-5, atol=1e-7)
    assert not torch.equal(exported[name], steps[-1])
    assert "mean of steps 8, 10, 12" in (tmp_path / "hf/README.md").read_text()


def test_the_mean_of_the_last_checkpoints_is_scored(runs: Path) -> None:
    asked = {"one": ("--step", "12"), "mean of one": ("--average", "last:1"), "mean": ("--average", "last:3")}
    jobs = {
        name: Job(
            ["-m", "dstrain.cli.main", "evaluate", str(runs / "whole"), *words], world_size=1, log_folder=runs / name
        )
        for name, words in asked.items()
    }
    for job in jobs.values():
        job.succeed()
    scores = {name: printed(job) for name, job in jobs.items()}
    assert scores["one"] == scores["mean of one"]
    assert scores["mean"]["targets"] == scores["one"]["targets"]
    assert scores["mean"]["loss"] != scores["one"]["loss"]


def printed(job: Job) -> dict[str, float]:
    """The object that a command has printed."""
    found = re.search(r"^\{$.*?^\}$", job.logs[0].read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, job.output()
    return json.loads(found[0])  # type: ignore[no-any-return]
