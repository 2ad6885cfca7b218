"""One rank that measures what an engine and its steps take of this process's memory, for each ZeRO stage and precision.

Started by tests/dist/test_footprint.py with malloc told to map every larger block by itself and to give it back at once, so that
the resident size follows what torch holds. Sizes are differences: the resident size before the engine is built, after, and the
highest one during steps (the kernel's own mark, reset in between).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import MicroBatch
from dstrain.base.world import world_from_environment
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import build_masked_lm
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import Engine, start_processes, stop_processes
from tests.support.tiny_models import step_data

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}
"""What the environment of a rank must hold."""
TINY: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def build(control: ControlPlane, model: dict[str, Any], case: dict[str, Any]) -> Engine:
    torch.manual_seed(1)
    built = build_masked_lm(
        ModelConfig(config=model, pad_vocab_to=1), vocab_size=case["vocabulary"], special={"pad_token_id": 0}
    )
    return Engine(
        built, MlmObjective(), config=EngineConfig(zero_stage=case["stage"], bucket_elements=case["bucket"]),
        optimizer=OptimizerConfig(), control=control, device="cpu", precision=case["precision"], micro_batch=case["rows"],
        accumulation=case["accumulation"], seed=1,
    )  # fmt: skip


def micro_batch(case: dict[str, Any]) -> MicroBatch:
    rows, length = case["rows"], case["length"]
    tokens = torch.arange(rows * length) % (case["vocabulary"] - 5) + 5
    targets = torch.arange(0, rows * length, round(1 / case["mask_rate"]))
    return MicroBatch(
        tokens=tokens, positions=torch.arange(length).repeat(rows), lengths=(length,) * rows, targets=targets,
        labels=tokens[targets], num_targets=len(targets), num_tokens=rows * length,
    )  # fmt: skip


def resident(key: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def measure(control: ControlPlane, case: dict[str, Any]) -> dict[str, Any]:
    data = step_data([micro_batch(case)] * case["accumulation"])
    warm = build(control, TINY, case)  # libraries, threads and buffers that a process has once
    for step in range(2):
        warm.train_step(data, step=step, learning_rate=1e-3)
    gc.collect()
    before = resident("VmRSS")
    engine = build(control, case["model"], case)
    gc.collect()
    for step in range(2):
        engine.train_step(data, step=step, learning_rate=1e-3)
    gc.collect()
    settled = resident("VmRSS")
    reset_peak()
    engine.train_step(data, step=2, learning_rate=1e-3)
    return {**case, "settled": settled - before, "peak": resident("VmHWM") - before, "baseline": before}


def main(out: Path, case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    control = start_processes(world, device="cpu", timeout_s=240)
    found = measure(control, case)
    if world.is_first:
        out.write_text(json.dumps(found), encoding="utf-8")
    gc.collect()
    stop_processes(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
