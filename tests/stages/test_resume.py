"""A run continued from its checkpoint is the run: every later step bit for bit, at each ZeRO stage and precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dstrain.cli.main import main
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_a_resumed_run_repeats_the_undisturbed_one_bit_for_bit(
    shards: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    settings = pretrain_settings(
        shards, tmp_path / "run", train={"max_steps": 6}, checkpoint={"every_steps": 3, "keep_last": 2},
        engine={"zero_stage": stage, "precision": precision, "bucket_elements": 100_000},
        model={"config": {"hidden_dropout_prob": 0.1}},
    )  # fmt: skip
    config = str(write_config(tmp_path / "run.yaml", settings))
    assert main(["pretrain", config]) == 0
    whole = step_events(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    (tmp_path / "run/events.jsonl").unlink()
    assert main(["pretrain", config, "train.resume=require"]) == 0
    again = step_events(tmp_path / "run")
    assert sorted(again) == [4, 5, 6]
    for step, event in again.items():
        for key in ("loss", "accuracy", "gradient_norm", "ledger"):
            assert event[key] == whole[step][key], (step, key)
