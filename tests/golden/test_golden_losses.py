"""Twenty steps of pretraining and ten of fine-tuning give the losses of `losses.json`; same numbers or a reason.

After a change that is meant to move them: DSTRAIN_UPDATE_GOLDEN=1 pytest tests/golden, and say why in CHANGELOG.md.
The ledger (which rows, which masks) must be equal everywhere. Losses must be equal bit for bit with the torch version and
the CPU instruction set that the file was made with, and within 1e-3 elsewhere, where sums are taken in another order.
Gradient norms, which nothing is computed from below the clipping limit, must be equal within 1e-6.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dstrain.cli.main import main
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config

GOLDEN = Path(__file__).with_name("losses.json")
MADE_BY = "DSTRAIN_UPDATE_GOLDEN=1 pytest tests/golden"
UPDATE = os.environ.get("DSTRAIN_UPDATE_GOLDEN") == "1"
TOLERANCE = 1e-3
NORM_TOLERANCE = 1e-6
"""The norm's last bit was seen to depend on what ran before in the same process, with every loss after it equal bit for bit."""
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def platform() -> dict[str, str]:
    """What decides the last bits of a sum on a CPU."""
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_vendor": cpu_vendor(),
    }


def cpu_vendor() -> str:
    """The BLAS chooses its kernels by it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")


def read(run_folder: Path, *, steps: int) -> dict[str, list[Any]]:
    events = step_events(run_folder)
    assert sorted(events) == list(range(1, steps + 1))
    return {
        "loss": [events[n]["loss"] for n in sorted(events)],
        "gradient_norm": [events[n]["gradient_norm"] for n in sorted(events)],
        "ledger": [str(events[n]["ledger"]) for n in sorted(events)],
        "targets": [events[n]["num_targets"] for n in sorted(events)],
    }


def pretrain(folder: Path) -> dict[str, list[Any]]:
    shards = build_tiny_shards(folder)
    settings = pretrain_settings(
        shards,
        folder / "pretrain",
        train={"max_steps": 20},
        checkpoint={"every_steps": None},
        model={"config": DROPOUT},
    )
    assert main(["pretrain", str(write_config(folder / "pretrain.yaml", settings))]) == 0
    return read(folder / "pretrain", steps=20)


def finetune(folder: Path) -> dict[str, list[Any]]:
    words = (("happy", "good"), ("wretched", "bad"))
    rows = [f"evening {i} at the {words[i % 2][0]} house {'of it ' * (i % 5)}\t{words[i % 2][1]}" for i in range(60)]
    (folder / "task.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    settings = {
        "run_folder": str(folder / "finetune"), "seed": 3, "model": {"init_from": str(folder / "pretrain")},
        "task": {"kind": "classification", "train": str(folder / "task.tsv"), "max_length": 32, "validation_fraction": 0.2},
        "optimizer": {"learning_rate": 5e-3}, "engine": {"precision": "fp32", "device": "cpu", "threads": 1},
        "train": {"global_batch": 16, "micro_batch": 8, "max_steps": 10}, "checkpoint": {"every_steps": None},
        "monitor": {"log_every": 1, "tensorboard": False},
    }  # fmt: skip
    assert main(["finetune", str(write_config(folder / "finetune.yaml", settings))]) == 0
    return read(folder / "finetune", steps=10)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("golden")
    runs = {"pretrain": pretrain(folder), "finetune": finetune(folder)}
    if UPDATE:
        content = {"made_by": MADE_BY, "platform": platform(), "runs": runs}
        GOLDEN.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return runs


@pytest.fixture(scope="module")
def golden(found: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return content


RUNS = pytest.mark.parametrize("run", ["pretrain", "finetune"])


@RUNS
def test_every_step_sees_the_recorded_rows_and_masks(found: Any, golden: Any, run: str) -> None:
    for key in ("ledger", "targets"):
        assert found[run][key] == golden["runs"][run][key]


@RUNS
@pytest.mark.parametrize("key", ["loss", "gradient_norm"])
def test_losses_are_the_recorded_ones(found: Any, golden: Any, run: str, key: str) -> None:
    recorded = golden["runs"][run][key]
    if platform() == golden["platform"] and key == "loss":
        assert found[run][key] == recorded
    elif platform() == golden["platform"]:
        assert found[run][key] == pytest.approx(recorded, rel=NORM_TOLERANCE)
    else:
        assert found[run][key] == pytest.approx(recorded, rel=TOLERANCE, abs=TOLERANCE)


def test_the_recorded_runs_learn(golden: Any) -> None:
    for run in golden["runs"].values():
        losses = run["loss"]
        assert sum(losses[-3:]) < sum(losses[:3]), "a golden run that does not learn would not notice much"
