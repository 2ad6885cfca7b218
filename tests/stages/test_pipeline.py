"""From shards to an exported classifier through the command line, in one process: every stage on what the last one left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from dstrain.cli.main import main
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Path:
    shards = build_tiny_shards(folder)
    config = write_config(
        folder / "pretrain.yaml", pretrain_settings(shards, folder / "run", train={"evaluate_every": 6})
    )
    assert main(["pretrain", str(config)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def task_file(folder: Path) -> Path:
    good, bad = ("happy", "amiable", "charming"), ("wretched", "odious", "cruel")
    lines = ["text\tlabel\tscore"]
    for i in range(120):
        word, label = (good[i % 3], "positive") if i % 2 else (bad[i % 3], "negative")
        lines.append(f"number {i} was a {word} evening at the house\t{label}\t{(i % 2) * 2 - 1 + i / 1000}")
    path = folder / "task.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def finetune_settings(folder: Path, task_file: Path, name: str, **sections: object) -> Path:
    settings = {
        "run_folder": str(folder / name),
        "model": {"init_from": str(folder / "run")},
        "task": {
            "kind": "classification",
            "train": str(task_file),
            "test": str(task_file),
            "max_length": 32,
            "validation_fraction": 0.3,
        },
        "optimizer": {"learning_rate": 2e-3},
        "engine": {"precision": "fp32", "device": "cpu", "threads": 1},
        "train": {"global_batch": 16, "micro_batch": 8, "max_steps": 60, "evaluate_every": 20},
        "monitor": {"log_every": 1},
    }
    return write_config(folder / f"{name}.yaml", {**settings, **sections})


def test_a_run_folder_holds_everything_a_person_and_a_tool_need(pretrained: Path) -> None:
    for name in ("config.yaml", "environment.json", "deepspeed.json", "events.jsonl", "checkpoints", "exit"):
        assert (pretrained / name).exists(), name
    events = step_events(pretrained)
    assert sorted(events) == list(range(1, 13))
    assert {"data", "forward_backward", "step", "save", "evaluate", "other", "total"} <= set(events[12]["seconds"])
    kept = sorted(p.name for p in (pretrained / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000012"], "retention keeps the last two"


def test_evaluation_of_a_checkpoint_repeats_the_evaluation_of_the_run(
    pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(pretrained)]) == 0
    metrics = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (pretrained / "events.jsonl").read_text().splitlines()]
    recorded = [e for e in lines if e["event"] == "evaluated"][-1]["metrics"]
    for key in ("loss", "accuracy", "unigram_accuracy", "targets"):
        assert metrics[key] == recorded[key]


def test_the_exported_folder_is_plain_hugging_face_with_the_checkpoints_logits(pretrained: Path, folder: Path) -> None:
    out = folder / "hf"
    assert main(["export", str(pretrained), "--out", str(out)]) == 0
    assert main(["export", str(pretrained), "--out", str(out)]) == 78, "an existing folder is never replaced unasked"
    model = AutoModelForMaskedLM.from_pretrained(out, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    from dstrain.checkpoint.reader import newest_valid

    checkpoint = newest_valid(pretrained / "checkpoints").checkpoint
    assert checkpoint is not None
    weights = checkpoint.tensors()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"she was {tokenizer.mask_token} of it")
    assert len(answers) == 5
    assert "| optimizer steps | 12 |" in (out / "README.md").read_text()


def test_finetuning_learns_keeps_its_best_checkpoint_and_writes_predictions(
    pretrained: Path, folder: Path, task_file: Path
) -> None:
    config = finetune_settings(folder, task_file, "tuned")
    assert main(["finetune", str(config)]) == 0
    run = folder / "tuned"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation"]["metrics"]["accuracy"] > metrics["validation"]["baseline"]["accuracy"]
    predictions = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    assert len(predictions) == 120
    hits = sum(p["label"] == p["predicted"] for p in predictions)
    assert hits / 120 == pytest.approx(metrics["test"]["metrics"]["accuracy"])
    assert main(["finetune", str(config)]) == 0, "a complete run says so and exits 0"

    assert main(["export", str(run), "--out", str(folder / "hf-tuned")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "hf-tuned", local_files_only=True)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_regression_runs_through_the_same_command(pretrained: Path, folder: Path, task_file: Path) -> None:
    task = {
        "kind": "regression",
        "train": str(task_file),
        "label": "score",
        "max_length": 32,
        "validation_fraction": 0.3,
    }
    config = finetune_settings(folder, task_file, "regression", task=task)
    assert main(["finetune", str(config)]) == 0
    metrics = json.loads((folder / "regression" / "metrics.json").read_text())
    assert metrics["validation"]["metrics"]["spearman"] > 0.5


def test_a_pretraining_run_can_start_from_an_exported_folder(pretrained: Path, folder: Path) -> None:
    out = folder / "hf-again"
    assert main(["export", str(pretrained), "--out", str(out)]) == 0
    settings = pretrain_settings(
        folder / "shards", folder / "continued", model={"config": {}, "init_from": str(out)}, train={"max_steps": 2}
    )
    settings["model"] = {"init_from": str(out)}
    assert main(["pretrain", str(write_config(folder / "continued.yaml", settings))]) == 0
    first = step_events(folder / "run")[1]["loss"]
    assert step_events(folder / "continued")[1]["loss"] < first - 0.1, "trained weights must be better than random ones"
