"""One rank of a world of the optimizer matrix: train at every stage, save, then go on from the other worlds' checkpoints.

Started by tests/dist/test_optimizers.py, once per world size, all worlds at the same time. Every world trains on the same
two micro-batches a step, whoever has them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from dstrain.base.control import ControlPlane
from dstrain.base.device import Precision
from dstrain.base.protocols import MicroBatch, StepData
from dstrain.base.world import world_from_environment
from dstrain.checkpoint.manifest import model_fingerprint, stored_states
from dstrain.checkpoint.reader import Checkpoint
from dstrain.checkpoint.writer import CheckpointConfig, CheckpointWriter
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import architecture_of, build_masked_lm
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import Engine, start_processes, stop_processes

WORLDS, KINDS = (1, 2, 3), ("stable_adamw", "lamb", "muon")
SETUPS = ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"))
"""ZeRO stage and precision; the last is what runs on GPUs by default, and another class of DeepSpeed's."""
SAVED, LAST = 2, 4
# Odd sizes, so that partitions cut through matrices; a fused query-key-value matrix.
SHAPE = {
    "model_type": "modernbert", "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 18,
    "max_position_embeddings": 31,
}  # fmt: skip


def build(control: ControlPlane, *, stage: int, precision: Precision, kind: str) -> Engine:
    torch.manual_seed(3)
    model = build_masked_lm(ModelConfig(config=SHAPE, pad_vocab_to=1), vocab_size=53, special={"pad_token_id": 0})
    optimizer = OptimizerConfig(kind=kind, weight_decay=0.1)  # type: ignore[arg-type]
    return Engine(
        model, MlmObjective(), config=EngineConfig(zero_stage=stage), optimizer=optimizer, control=control, device="cpu",
        precision=precision, micro_batch=2, accumulation=-(-6 // control.world.size), seed=1,
    )  # fmt: skip


def step_data(step: int, *, rank: int, world_size: int) -> StepData:
    """This rank's share of the six micro-batches of a step."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for number in range(6):
        tokens = torch.randint(5, 53, (15,), generator=generator)
        positions = torch.cat([torch.arange(9), torch.arange(6)])
        targets = torch.arange(0, 15, 4)
        if number % world_size == rank:
            batches.append(MicroBatch(tokens, positions, (9, 6), targets, tokens[targets], None, len(targets), 15))
    return StepData(batches, 2 * len(batches), 15 * len(batches), 0, 0.0)


def train(engine: Engine, first: int, last: int, *, rate: float = 2e-2) -> list[float]:
    world = engine.control.world
    return [
        engine.train_step(step_data(n, rank=world.rank, world_size=world.size), step=n, learning_rate=rate).loss
        for n in range(first, last)
    ]


def save(engine: Engine, folder: Path, *, stage: int) -> None:
    state, world = engine.fragments, engine.control.world
    manifest: dict[str, Any] = {
        "step": state.optimizer_step(), "world_size": world.size, "zero_stage": stage, "precision": engine.precision,
        "stage": "pretrain", "parameters": state.shapes, "model_fingerprint": model_fingerprint(state.shapes),
        "architecture": architecture_of(engine.model), "state": {}, "loader": {}, **stored_states(state.moments),
        "optimizer": {"step": state.optimizer_step()},
    }  # fmt: skip
    writer = CheckpointWriter(folder, config=CheckpointConfig(), control=engine.control)
    writer.save(state.owned(rank=world.rank, world_size=world.size), manifest, config_yaml="", tokenizer=None)


def load(engine: Engine, folder: Path) -> None:
    with torch.no_grad():
        Checkpoint(folder).load_into(engine.fragments.held())
    engine.fragments.refresh()
    engine.fragments.set_optimizer_step(SAVED)


def name(world: int, stage: int, precision: str, kind: str) -> str:
    return f"w{world}-z{stage}-{precision}-{kind}"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    control = start_processes(world, device="cpu", timeout_s=120)
    losses: dict[str, list[float]] = {}
    engines = {}
    for stage, precision in SETUPS:
        for kind in KINDS:
            engine = engines[stage, precision, kind] = build(control, stage=stage, precision=precision, kind=kind)
            own = name(world.size, stage, precision, kind)
            losses[own] = train(engine, 0, SAVED)
            save(engine, root / own, stage=stage)
            losses[own] += train(engine, SAVED, LAST)
            save(engine, root / own, stage=stage)
    # The checkpoints go round: each world and set-up goes on from those of the world and set-up before it.
    for number, (stage, precision) in enumerate(SETUPS):
        source_world, source_setup = WORLDS[(WORLDS.index(world.size) + 1) % 3], SETUPS[(number + 1) % len(SETUPS)]
        for kind in KINDS:
            own = name(world.size, stage, precision, kind)
            for source in (own, name(source_world, *source_setup, kind)):
                path = root / source / f"step-{SAVED:08d}"
                while not path.exists():
                    time.sleep(0.05)
                engine = engines[stage, precision, kind]
                load(engine, path)
                losses[f"{source}-to-{own}"] = train(engine, SAVED, LAST)
                save(engine, root / "resumed" / f"{source}-to-{own}", stage=stage)
    if world.is_first:
        (root / f"losses-{world.size}.json").write_text(json.dumps(losses))
    stop_processes(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
