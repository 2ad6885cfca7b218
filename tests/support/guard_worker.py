"""One rank that is given NaN and spikes at random places, and writes down what was decided and whether a byte changed.

Started by tests/fault/test_guards.py with two ranks. What is injected is drawn from the seed alone, so every rank knows the
whole plan, but only the rank it names is disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch import Tensor, nn

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import LossParts, MicroBatch, StepData
from dstrain.base.world import world_from_environment
from dstrain.checkpoint.fragments import EngineState
from dstrain.health.guards import GuardConfig, Guards
from dstrain.train.engine import Engine, start_processes, stop_processes
from tests.support.matrix_worker import PRECISIONS, STAGES, build

NAN_STEPS, SPIKE_STEPS, HISTORY = 27, 70, 8
POLICIES = GuardConfig(loss_spike="skip", history_steps=32, least_history=HISTORY, sigmas=6.0, skips_limit=1000)
SPOILT = ("word_embeddings", "attention.output.dense", "intermediate.dense", "output.LayerNorm")
"""Modules behind which a gradient may be spoilt: each has parameters before it and after it."""


@dataclass(frozen=True)
class Injection:
    """What is spoilt at a step."""

    kind: str
    """loss (NaN or infinity beside a sound gradient), gradient (NaN behind one module), or spike (loss times 30)."""
    rank: int
    micro_batch: int
    module: int
    """Which module's output has the spoilt gradient."""
    value: float


def nan_plan(seed: int, *, ranks: int) -> dict[int, Injection]:
    """Every other step."""
    chance = random.Random(seed)
    return {
        step: Injection(
            chance.choice(["loss", "gradient"]), chance.randrange(ranks), chance.randrange(2), chance.randrange(1000),
            chance.choice([float("nan"), float("inf"), -float("inf")]),
        )
        for step in range(1, NAN_STEPS, 2)
    }  # fmt: skip


def spike_plan(seed: int, *, ranks: int) -> dict[int, Injection]:
    """Thirty steps after the history is long enough."""
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(HISTORY, SPIKE_STEPS), 30))
    return {step: Injection("spike", chance.randrange(ranks), chance.randrange(2), 0, 30.0) for step in steps}


class Disturber:
    """Stands between the engine and its objective."""

    def __init__(self, engine: Engine, rank: int) -> None:
        self._objective, self._rank = engine.engine.module._objective, rank
        self._modules = [m for name, m in engine.model.named_modules() if name.endswith(SPOILT)]
        self._loss = self._objective.loss
        self._objective.loss = self.loss
        self.now: Injection | None = None
        self._seen = 0
        self.fired = 0

    def begin(self, injection: Injection | None) -> None:
        """The next step's disturbance."""
        self.now, self._seen, self.fired = injection, 0, 0

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        mine = self.now is not None and self.now.rank == self._rank and self.now.micro_batch == self._seen
        self._seen += 1
        if not mine or self.now is None:
            return self._loss(model, batch)
        if self.now.kind == "gradient":
            return self._spoil_gradient(model, batch, self.now.module)
        self.fired += 1
        parts = self._loss(model, batch)
        loss = parts.loss_sum * self.now.value if self.now.kind == "spike" else parts.loss_sum + self.now.value
        return LossParts(loss, parts.correct)

    def _spoil_gradient(self, model: nn.Module, batch: MicroBatch, number: int) -> LossParts:
        def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                self.fired += 1
                output.register_hook(lambda gradient: gradient * float("nan"))

        handle = self._modules[number % len(self._modules)].register_forward_hook(spoil)
        try:
            return self._loss(model, batch)
        finally:
            handle.remove()


def digest(state: EngineState) -> str:
    """Of every byte of masters and moments that this rank holds, and of Adam's counter."""
    parts = [fragment.tensor.contiguous().numpy().tobytes() for fragment in state.held()]
    return hashlib.sha256(b"".join(parts) + str(state.optimizer_step()).encode()).hexdigest()


def step_data(rank: int, step: int) -> StepData:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    batches = []
    for _ in range(2):
        tokens, targets = torch.randint(5, 53, (15,), generator=generator), torch.arange(0, 15, 4)
        positions = torch.cat([torch.arange(9), torch.arange(6)])
        batches.append(MicroBatch(tokens, positions, (9, 6), targets, tokens[targets], None, len(targets), 15))
    return StepData(batches, 2, 30, 0, 0.0)


def disturbed(
    control: ControlPlane, stage: int, precision: str, plan: dict[int, Injection], steps: int
) -> dict[str, Any]:
    """A run with injections, and the same run whose judge leaves those steps out without any injection."""
    rank = control.world.rank
    engine, state = build(control, stage=stage, precision=precision, seed=stage)
    disturber, guards = Disturber(engine, rank), Guards(POLICIES)
    told: list[dict[str, Any]] = []
    for step in range(steps):
        before = digest(state)
        disturber.begin(plan.get(step))

        def judge(*, loss: float, gradient_norm: float, overflowed: bool, step: int = step) -> bool:
            told.append({"step": step})
            return guards.judge(step, loss=loss, gradient_norm=gradient_norm, overflowed=overflowed).action == "go_on"

        totals = engine.train_step(step_data(rank, step), step=step, learning_rate=1e-3, judge=judge)
        told[-1] |= {
            "verdict": guards.verdict.to_json(), "applied": totals.applied, "loss": repr(totals.loss),
            "norm": repr(totals.gradient_norm), "unchanged": digest(state) == before, "fired": disturber.fired,
        }  # fmt: skip
    reference, reference_state = build(control, stage=stage, precision=precision, seed=stage)
    for step in range(steps):
        reference.train_step(
            step_data(rank, step), step=step, learning_rate=1e-3, judge=lambda step=step, **numbers: step not in plan
        )
    return {"steps": told, "final": digest(state), "reference": digest(reference_state)}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    control = start_processes(world, device="cpu", timeout_s=120)
    found: dict[str, Any] = {}
    for number, (stage, precision) in enumerate((s, p) for s in STAGES for p in PRECISIONS):
        plan = nan_plan(number, ranks=world.size)
        found[f"nan z{stage} {precision}"] = disturbed(control, stage, precision, plan, NAN_STEPS)
    found["spike z1 fp32"] = disturbed(control, 1, "fp32", spike_plan(99, ranks=world.size), SPIKE_STEPS)
    (root / f"rank-{world.rank}.json").write_text(json.dumps(found))
    stop_processes(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
