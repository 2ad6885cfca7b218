"""The demo's table says what the runs' files say, and nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import demo_report


def _step(
    step: int, *, speed: float, seconds: float = 1.0, save: float = 0.0, padding: float = 0.0, steps: int = 10
) -> dict[str, Any]:
    times = {"total": seconds, "save": save, "evaluate": 0.0}
    return {
        "event": "step", "step": step, "tokens_per_second": speed, "padding_percent": padding, "window_steps": steps,
        "seconds": times, "epoch": step / 10,
    }  # fmt: skip


def _started(world: int, *, step: int = 0) -> dict[str, Any]:
    return {"event": "resumed" if step else "started", "step": step, "world": world}


def test_speed_is_told_apart_by_processes_and_leaves_warm_up_out() -> None:
    events = [
        _started(2), _step(1, speed=10, steps=1), _step(10, speed=100), _step(20, speed=300),
        _started(1, step=20), _step(30, speed=1), _step(40, speed=50),
    ]  # fmt: skip
    assert demo_report.speeds(events) == {2: pytest.approx(200.0), 1: pytest.approx(50.0)}


def test_time_spent_saving_is_not_training() -> None:
    events = [_started(2), _step(1, speed=1), _step(10, speed=100, seconds=2.0, save=1.0)]
    assert demo_report.speeds(events) == {2: pytest.approx(200.0)}


def test_a_single_point_counts_rather_than_none() -> None:
    assert demo_report.speeds([_started(1), _step(4, speed=70)]) == {1: pytest.approx(70.0)}


def test_padding_is_weighted_by_slots() -> None:
    events = [_step(10, speed=100, padding=50.0), _step(20, speed=100, padding=0.0)]
    assert demo_report.padding_percent(events) == pytest.approx(100 / 3)


def _write_demo(folder: Path, *, finetuned: float, scratch: float) -> None:
    evaluated = [
        {"event": "evaluated", "step": s, "metrics": {"loss": 9.0 - s / 10, "accuracy": s / 100, "unigram_accuracy": 0.06}}
        for s in (0, 40)
    ]  # fmt: skip
    events = [_started(2), evaluated[0], _step(1, speed=10), _step(20, speed=80), _started(1, step=20),
              _step(30, speed=5), _step(40, speed=40), evaluated[1]]  # fmt: skip
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain" / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    environment = {"precision": "bf16", "cores": 2, "processor": "a processor"}
    (folder / "pretrain" / "environment.json").write_text(json.dumps(environment))
    for name, accuracy in (("finetune", finetuned), ("scratch", scratch)):
        (folder / name).mkdir()
        results = {"metrics": {"accuracy": accuracy}, "baseline": {"accuracy": 0.5}, "examples": 400}
        (folder / name / "metrics.json").write_text(json.dumps({"validation": results}))


def test_the_summary_repeats_the_files(tmp_path: Path) -> None:
    _write_demo(tmp_path, finetuned=0.8, scratch=0.7)
    text = demo_report.report(tmp_path, spent={"pretrain": {"seconds": 3.0, "cpu_seconds": 5.0}}, quick=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["numbers"]["loss_before"] == 9.0
    assert summary["numbers"]["loss_after"] == 5.0
    assert summary["numbers"]["resumed_at_step"] == 20
    for part in (
        "80.0%",
        "70.0%",
        "50.0%",
        "40.0%",
        "6.0%",
        "+10.0 points",
        "tensorboard --logdir",
        "3 s (5 CPU-seconds)",
    ):
        assert part in text
        if part != "tensorboard --logdir":
            assert part in (tmp_path / "summary.md").read_text()


def test_a_comparison_that_pretraining_loses_says_so(tmp_path: Path) -> None:
    _write_demo(tmp_path, finetuned=0.70, scratch=0.72)
    assert "did not beat" in demo_report.report(tmp_path, spent={}, quick=False)


def test_a_gain_within_the_noise_is_called_so(tmp_path: Path) -> None:
    _write_demo(tmp_path, finetuned=0.71, scratch=0.70)
    assert "no more than chance" in demo_report.report(tmp_path, spent={}, quick=False)


def test_numbers_that_are_missing_are_dashes(tmp_path: Path) -> None:
    assert demo_report.collect(tmp_path) == {}
    table = demo_report.rows({}, precision="bf16")
    assert all(number == "–" for _, number, _ in table)
    assert demo_report.verdict({}) == []


def test_markdown_is_a_table_of_the_same_rows() -> None:
    page = demo_report.as_markdown([("a", "1", "b")], notes=["n"])
    assert "| a | 1 | b |" in page
    assert "- n" in page
