"""`model.kind: dstrain-encoder` from shards to a native ModernBERT folder, stopped and resumed on the way, as the other kind would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, ModernBertForMaskedLM

from dstrain.cli.main import main
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config

MODEL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "local_attention": 16,
    "global_attn_every_n_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def train(folder: Path, shards: Path, name: str, **sections: Any) -> Path:
    """Run to the configured end; returns the run folder."""
    settings = pretrain_settings(shards, folder / name, **sections)
    settings["model"] = sections["model"]
    assert main(["pretrain", str(write_config(folder / f"{name}.yaml", settings))]) == 0
    return folder / name


def losses(run: Path) -> list[float]:
    events = step_events(run)
    return [events[step]["loss"] for step in sorted(events)]


def test_it_trains_as_transformers_code_does_resumes_bit_by_bit_and_exports(shards: Path, tmp_path: Path) -> None:
    own = {"kind": "dstrain-encoder", "config": MODEL}
    whole = train(tmp_path, shards, "whole", model=own)
    theirs = train(tmp_path, shards, "theirs", model={"config": {"model_type": "modernbert", **MODEL}})
    assert losses(whole) == pytest.approx(losses(theirs), rel=1e-4)

    train(tmp_path, shards, "parts", model=own, train={"max_steps": 5}, schedule={"kind": "constant"})
    assert losses(train(tmp_path, shards, "parts", model=own, schedule={"kind": "constant"}))
    straight = train(tmp_path, shards, "straight", model=own, schedule={"kind": "constant"})
    assert losses(tmp_path / "parts") == losses(straight)

    assert main(["export", str(whole), "--out", str(tmp_path / "hf")]) == 0
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path / "hf"), ModernBertForMaskedLM)
    assert main(["evaluate", str(whole)]) == 0


def test_either_code_goes_on_from_the_others_checkpoint(shards: Path, tmp_path: Path) -> None:
    own = {"kind": "dstrain-encoder", "config": MODEL}
    train(tmp_path, shards, "run", model=own, train={"max_steps": 5}, schedule={"kind": "constant"})
    other = {"config": {"model_type": "modernbert", **MODEL}}
    run = train(tmp_path, shards, "run", model=other, train={"max_steps": 9}, schedule={"kind": "constant"})
    assert sorted(step_events(run)) == list(range(1, 10))
