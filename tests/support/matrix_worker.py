"""One rank of the checkpoint matrix: write a checkpoint at each stage and precision, then load everybody's at each stage.

Started by tests/dist/test_checkpoint_matrix.py, once per world size, all worlds at the same time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import MicroBatch, StepData
from dstrain.base.world import world_from_environment
from dstrain.checkpoint.fragments import EngineState
from dstrain.checkpoint.manifest import STATES, model_fingerprint
from dstrain.checkpoint.reader import Checkpoint
from dstrain.checkpoint.writer import CheckpointConfig, CheckpointWriter
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import architecture_of, build_masked_lm
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import PARAMETER_PREFIX, Engine, start_processes, stop_processes

WORLDS, STAGES, PRECISIONS = (1, 2, 3), (0, 1, 2, 3), ("fp32", "bf16")
# Odd sizes, so that no parameter divides evenly into partitions and padding has to be clipped.
SHAPE = {
    "model_type": "bert", "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37,
    "max_position_embeddings": 31, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def build(
    control: ControlPlane, *, stage: int, precision: str, seed: int, shape: dict[str, Any] = SHAPE, vocab_size: int = 53
) -> tuple[Engine, EngineState]:
    torch.manual_seed(seed)
    config = ModelConfig(config=shape, pad_vocab_to=1)
    model = build_masked_lm(config, vocab_size=vocab_size, special={"pad_token_id": 0})
    engine = Engine(
        model, MlmObjective(), config=EngineConfig(zero_stage=stage), optimizer=OptimizerConfig(), control=control,
        device="cpu", precision=precision, micro_batch=1, accumulation=2, seed=1,  # type: ignore[arg-type]
    )  # fmt: skip
    return engine, EngineState(engine.engine, prefix=PARAMETER_PREFIX)


def train(engine: Engine, *, rank: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(100 + rank)
    for step in range(steps):
        batches = []
        for _ in range(2):
            tokens = torch.randint(5, 53, (15,), generator=generator)
            positions = torch.cat([torch.arange(9), torch.arange(6)])
            targets = torch.arange(0, 15, 4)
            batches.append(
                MicroBatch(
                    tokens=tokens,
                    positions=positions,
                    lengths=(9, 6),
                    targets=targets,
                    labels=tokens[targets],
                    num_targets=len(targets),
                    num_tokens=15,
                )
            )
        engine.train_step(StepData(batches, 2, 30, 0, 0.0), step=step, learning_rate=1e-2)


def save(engine: Engine, state: EngineState, folder: Path, *, stage: int, control: ControlPlane) -> None:
    writer = CheckpointWriter(folder, config=CheckpointConfig(), control=control)
    world = control.world
    manifest: dict[str, Any] = {
        "step": state.optimizer_step(), "world_size": world.size, "zero_stage": stage, "precision": engine.precision,
        "stage": "pretrain", "parameters": state.shapes, "model_fingerprint": model_fingerprint(state.shapes),
        "architecture": architecture_of(engine.model), "state": {}, "loader": {}, "states": STATES,
        "optimizer": {"step": state.optimizer_step()},
    }  # fmt: skip
    writer.save(state.owned(rank=world.rank, world_size=world.size), manifest, config_yaml="", tokenizer=None)


def name(world: int, stage: int, precision: str) -> str:
    return f"w{world}-z{stage}-{precision}"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    control = start_processes(world, device="cpu", timeout_s=120)
    engines: dict[tuple[int, str], tuple[Engine, EngineState]] = {}
    for number, (stage, precision) in enumerate((s, p) for s in STAGES for p in PRECISIONS):
        engine, state = build(control, stage=stage, precision=precision, seed=10 * world.size + number)
        train(engine, rank=world.rank, steps=2)
        save(engine, state, root / "written" / name(world.size, stage, precision), stage=stage, control=control)
        engines[stage, precision] = engine, state
    sources = [root / "written" / name(w, s, p) / "step-00000002" for w in WORLDS for s in STAGES for p in PRECISIONS]
    while not all(source.exists() for source in sources):
        time.sleep(0.05)
    for stage in STAGES:
        for source in sources:
            precision = PRECISIONS[(stage + sources.index(source) // 2) % 2]  # crosses precisions as well
            engine, state = engines[stage, precision]
            checkpoint = Checkpoint(source)
            with torch.no_grad():
                checkpoint.load_into(state.held())
            state.refresh()
            state.set_optimizer_step(2)
            save(
                engine,
                state,
                root / "crossed" / f"{source.parent.name}-to-{name(world.size, stage, precision)}",
                stage=stage,
                control=control,
            )
    stop_processes(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
