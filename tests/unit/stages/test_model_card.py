"""The card says what the run did, from its own records, and survives their absence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.base.config import parse_yaml
from dstrain.checkpoint.reader import Checkpoint
from dstrain.stages.model_card import model_card
from tests.support.tiny_checkpoints import fragments_of, manifest_of, state_of, writer_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    manifest = manifest_of(
        12,
        state={"step": 12, "rows": 144, "tokens": 6912, "ledger": 99, "compute_seconds": 7200.0},
        loader={"fingerprint": "f00d", "sequence_length": 48, "corruption": "mlm.v1 rate=0.3"},
        extra={"labels": ["good", "bad"], "init_from": "runs/a"},
        environment={"torch": "2.13"},
        precision="bf16",
        zero_stage=2,
    )
    folder = writer_of(tmp_path / "my-run/checkpoints").save(
        fragments_of(state_of(12)), manifest, config_yaml="seed: 7\n", tokenizer=None
    )
    return Checkpoint(folder)


def card(tmp_path: Path, checkpoint: Checkpoint) -> str:
    return model_card(tmp_path / "my-run", checkpoint)


def test_the_card_begins_with_metadata_that_the_hub_reads(tmp_path: Path, checkpoint: Checkpoint) -> None:
    _, front, rest = card(tmp_path, checkpoint).split("---\n", 2)
    assert parse_yaml(front, source="card") == {
        "library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["dstrain"],
    }  # fmt: skip
    assert rest.lstrip().startswith("# my-run")


@pytest.mark.parametrize(
    "line",
    [
        "| optimizer steps | 12 |", "| rows (or examples) seen | 144 |", "| tokens seen | 6912 |", "| data ledger | 99 |",
        "| training time | 2.000 h on 1 process(es), over all restarts |", "| precision, sharding | bf16, ZeRO-2 |",
        "| data fingerprint | f00d |", "| row length | 48 |", "| masking | mlm.v1 rate=0.3 |", "| labels | good, bad |",
        "| started from | runs/a |", "seed: 7", '"torch": "2.13"',
    ],
)  # fmt: skip
def test_the_card_holds_the_numbers_of_the_run(tmp_path: Path, checkpoint: Checkpoint, line: str) -> None:
    assert line in card(tmp_path, checkpoint)


def test_the_card_shows_the_evaluation_of_the_exported_step_not_a_later_one(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    assert "No evaluation was recorded." in card(tmp_path, checkpoint)
    events = [
        {"event": "evaluated", "time": 0.0, "step": step, "metrics": {"loss": float(step)}} for step in (6, 12, 18)
    ]
    text = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "my-run/events.jsonl").write_text(text)
    said = card(tmp_path, checkpoint)
    assert "Held-out data at step 12:" in said
    assert "| loss | 12.0000 |" in said
    assert "18.0" not in said
