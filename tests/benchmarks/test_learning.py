"""The learning benchmark: its arithmetic, and that all of it runs, is found again, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--hidden", "32", "--layers", "3", "--vocab", "300", "--row-length", "16", "--rows", "2", "--steps", "4", "--held-out-rows", "4",
    "--widen", "1", "--seeds", "3",
)  # fmt: skip
ARMS = ("masking 0.3 to 0.15", "grown from a half", "constant rate, mean of 4")
TWICE = """
import sys
import learning
learning.main([*sys.argv[1:], "--name", "first"])
learning.main([*sys.argv[1:], "--name", "again", "--seconds", "0"])
"""


def imported(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def corpus(folder: Path) -> Path:
    path = folder / "stories.jsonl"
    words = "the quick brown fox jumps over a lazy dog while seven wise owls watch".split()
    path.write_text(
        "".join(
            json.dumps({"text": " ".join(words[(i * 3 + k * k) % 14] for k in range(30 + i % 9))}) + "\n"
            for i in range(200)
        )
    )
    return path


def test_every_run_is_made_once_and_found_again(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", TWICE, "--corpus", str(corpus(tmp_path)), "--work", str(tmp_path / "work"), "--results", str(tmp_path),
        *TINY, "--arms", *ARMS,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = (json.loads(next(tmp_path.glob(f"*-{name}.json")).read_text()) for name in ("first", "again"))
    assert again["runs"] == first["runs"], "with no time left, all runs were found"
    assert {run["arm"] for run in first["runs"]} == {"adamw, wsd", *ARMS}
    assert len({run["rate"] for run in first["runs"] if run["arm"] == "adamw, wsd"}) >= 3
    rows = {row["name"]: row for row in first["summary"]}
    assert rows["adamw, wsd"]["differences"] == [0.0]
    assert rows["constant rate, mean of 4 (averaged)"]["loss"] != rows["constant rate, mean of 4"]["loss"]
    tokens = [run["tokens"] for run in first["runs"] if run["length"] == 1.0]
    assert max(tokens) <= 1.1 * min(tokens), "all arms train on as many tokens"
    table = next(tmp_path.glob("*-first.md")).read_text()
    assert all(f"| {name} |" in table for name in rows)


def test_tokens_needed_are_read_off_the_baselines_own_curve() -> None:
    needed = imported("learning").tokens_needed
    curve = {0.5: 5.0, 1.0: 4.0, 2.0: 3.0}
    assert needed(curve, 4.0) == (pytest.approx(1.0), "")
    assert needed(curve, 3.5) == (pytest.approx(2**0.5), "")
    assert needed(curve, 6.0) == (0.5, "<")
    assert needed(curve, 2.0) == (2.0, ">")


def test_a_sweep_goes_on_while_its_best_rate_is_the_last_one() -> None:
    learning = imported("learning")

    class Bowl:
        def __init__(self) -> None:
            self.tried: list[float] = []

        def run(self, arm: object, *, rate: float, seed: int) -> Any:
            self.tried.append(rate)
            return type("Found", (), {"loss": (rate - 8.0) ** 2})()

    bench, arm = Bowl(), imported("learning_arms").Arm("swept", rates=(1.0, 2.0, 4.0))
    assert learning.sweep(bench, arm, arm.rates, seed=0, widen=5) == 8.0
    assert bench.tried == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_what_is_left_out_is_not_counted_as_arithmetic() -> None:
    arms = imported("learning_arms")
    size = arms.Size(hidden=64, layers=4, vocab=1000, row_length=64, rows=8, steps=50, held_out_rows=8)
    flops = {arm.name: arms.training_flops(size, arm, seed=0) for arm in arms.arms(size)}
    plain = flops[arms.BASELINE]
    assert flops["linear"] == flops["lamb"] == flops["half the batch for a quarter"] == plain
    assert max(flops["layer dropping"], flops["token dropping"], flops["masking 0.3 to 0.15"]) < plain
    assert plain < flops["grown from a half"] < 1.5 * plain
    assert flops["muon"] > plain
