"""What two processes really take of memory at each ZeRO stage and precision, against the planner's parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import anatomy_without_weights
from dstrain.train.footprint import Batch, Footprint, footprint
from dstrain.train.traffic import Sharding
from tests.support.footprint_worker import MALLOC
from tests.support.runs import Job

pytestmark = pytest.mark.dist

MODEL = {
    "model_type": "bert", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048,
    "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CASE = {"model": MODEL, "vocabulary": 8000, "length": 256, "mask_rate": 0.25}
TOLERANCE = 0.10


def measured(folder: Path, case: dict[str, Any], *, world: int) -> dict[str, Any]:
    out = folder / "measured.json"
    command = ["-m", "tests.support.footprint_worker", str(out), json.dumps(case)]
    with Job(command, world_size=world, log_folder=folder / "logs", environment=MALLOC) as job:
        job.succeed(timeout_s=280)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def planned(case: dict[str, Any], *, world: int) -> Footprint:
    anatomy = anatomy_without_weights(ModelConfig(config=case["model"], pad_vocab_to=1), vocab_size=case["vocabulary"])
    sharding = Sharding(case["stage"], case["precision"], world, case["accumulation"], case["bucket"])
    tokens = case["rows"] * case["length"]
    batch = Batch(tokens, round(tokens * case["mask_rate"]), case["length"])
    return footprint(anatomy, sharding, batch, device="cpu")


# Many rows: the middle of the backward decides. One row: the reduction of gradients does.
FEW = [(0, "fp32", 2, 1, 50_000_000), (1, "bf16", 2, 8, 50_000_000), (3, "bf16", 2, 8, 4_000_000)]
ALL = [
    (stage, precision, accumulation, rows, 50_000_000)
    for stage in range(4)
    for precision in ("fp32", "bf16")
    for accumulation, rows in ((1, 1), (1, 8), (2, 8))
]
ALL += [(stage, "fp32", 1, 8, 4_000_000) for stage in (1, 2, 3)]


def check(case: dict[str, Any], folder: Path) -> None:
    found, plan = measured(folder, case, world=2), planned(case, world=2)
    error = plan.total / found["peak"] - 1
    print(
        f"stage {case['stage']} {case['precision']} accumulation {case['accumulation']} rows {case['rows']} bucket {case['bucket']}: "
        f"measured {found['peak'] / 1e6:.0f} MB, planned {plan.total / 1e6:.0f} MB ({error:+.1%}, {plan.peak})"
    )
    assert abs(error) < TOLERANCE, [(part.name, round(part.num_bytes / 1e6)) for part in plan.at_peak()]
    assert plan.at("backward" if case["rows"] > 1 else "reduction") == plan.total or case["stage"] == 0


@pytest.mark.parametrize(("stage", "precision", "accumulation", "rows", "bucket"), FEW)
def test_a_step_takes_the_memory_that_the_plan_says(
    tmp_path: Path, stage: int, precision: str, accumulation: int, rows: int, bucket: int
) -> None:
    case = {"stage": stage, "precision": precision, "accumulation": accumulation, "rows": rows, "bucket": bucket}
    check({**CASE, **case}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "accumulation", "rows", "bucket"), [case for case in ALL if case not in FEW]
)
def test_so_does_every_other_stage_and_precision(
    tmp_path: Path, stage: int, precision: str, accumulation: int, rows: int, bucket: int
) -> None:
    case = {"stage": stage, "precision": precision, "accumulation": accumulation, "rows": rows, "bucket": bucket}
    check({**CASE, **case}, tmp_path)
