"""The model card of an exported folder: what it was trained on, how long, at what cost. Text only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.base.config import read_yaml
from dstrain.base.errors import DstrainError
from dstrain.base.storage import read_json
from dstrain.checkpoint.reader import Checkpoint
from dstrain.monitor.events import current_curve, read_events


def model_card(run_folder: Path, checkpoint: Checkpoint, *, averaged: Sequence[int] = ()) -> str:
    """Markdown with front matter, from the checkpoint and the run's own records."""
    manifest, state = checkpoint.manifest, checkpoint.manifest.state
    pipeline = "fill-mask" if manifest.stage == "pretrain" else "text-classification"
    done = "pretrained as a masked language model" if manifest.stage == "pretrain" else "fine-tuned"
    hours = float(state.get("compute_seconds", 0.0)) / 3600
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {pipeline}", "tags:", "- dstrain", "---", "",
        f"# {run_folder.name}", "",
        f"A {manifest.architecture.get('model_type')} encoder, {done} with dstrain.",
        "", "| | |", "|---|---|",
        f"| optimizer steps | {manifest.step} |",
        *([f"| weights | mean of steps {', '.join(map(str, averaged))} |"] if averaged else []),
        f"| rows (or examples) seen | {state.get('rows', 0)} |",
        f"| tokens seen | {state.get('tokens', 0)} |",
        f"| training time | {hours:.3f} h on {manifest.world_size} process(es), over all restarts |",
        f"| precision, sharding | {manifest.precision}, ZeRO-{manifest.zero_stage} |",
        f"| data ledger | {state.get('ledger', 0)} |",
        *[f"| {name} | {value} |" for name, value in _data_rows(manifest.loader, manifest.extra)],
        *[f"| {name} | {value} |" for name, value in _cost_rows(run_folder)],
        "", "## Evaluation", "", *_evaluation(run_folder, manifest.step),
        "", "## Configuration", "", "```yaml", _configuration(checkpoint.folder), "```", "",
        "## Versions", "", "```json", json.dumps(manifest.environment, indent=1), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _data_rows(loader: dict[str, Any], extra: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [
        ("data fingerprint", loader.get("fingerprint")),
        ("row length", loader.get("sequence_length")),
        ("masking", loader.get("corruption")),
    ]
    rows += [("training tokens in the corpus", extra.get("data_tokens")), ("documents", extra.get("data_documents"))]
    rows += [("labels", ", ".join(extra.get("labels", [])) or None), ("started from", extra.get("init_from") or None)]
    return [(name, value) for name, value in rows if value is not None]


def _events(run_folder: Path) -> list[dict[str, Any]]:
    try:
        return read_events(run_folder / "events.jsonl")
    except DstrainError:
        return []


def _cost_rows(run_folder: Path) -> list[tuple[str, Any]]:
    costs = [e["cost_usd"] for e in _events(run_folder) if "cost_usd" in e]
    try:
        environment = read_json(run_folder / "environment.json")
    except DstrainError:
        environment = {}
    rows: list[tuple[str, Any]] = [("device", environment.get("device"))] if environment else []
    return rows + ([("cost, US dollars", f"{costs[-1]:.2f}")] if costs else [])


def _evaluation(run_folder: Path, step: int) -> list[str]:
    found = [
        e for e in current_curve(_events(run_folder)) if e.get("event") == "evaluated" and e.get("step", 0) <= step
    ]
    if not found:
        return ["No evaluation was recorded."]
    metrics = found[-1].get("metrics", {})
    return [f"Held-out data at step {found[-1]['step']}:", "", "| metric | value |", "|---|---|"] + [
        f"| {name} | {float(value):.4f} |" for name, value in metrics.items()
    ]


def _configuration(folder: Path) -> str:
    try:
        read_yaml(folder / "config.yaml")
    except DstrainError:
        return "not available"
    return (folder / "config.yaml").read_text(encoding="utf-8").strip()
