"""Where a run runs (`Site`) and what a stage hands to it (`Assembly`)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dstrain.base.control import ControlPlane
from dstrain.base.device import Precision, choose_device, choose_precision
from dstrain.base.errors import DstrainError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import Loader, Objective, ShouldLeave, never
from dstrain.base.rank_hosts import expected_hosts, own_address
from dstrain.base.roll_call import Waiting, Word
from dstrain.base.seeds import derive
from dstrain.base.world import World
from dstrain.health.start_config import StartConfig
from dstrain.launcher.rank_environment import describe, take_up
from dstrain.models.huggingface import anatomy
from dstrain.stages.config import FinetuneConfig, PretrainConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import Engine, start_processes, stop_processes, take_gpu

_LOG = get_logger(__name__)

AnyConfig = PretrainConfig | FinetuneConfig


@dataclass(frozen=True)
class Site:
    """Where a run runs: ranks, device, agreements."""

    world: World
    control: ControlPlane
    device: str
    precision: Precision
    should_leave: ShouldLeave = never
    """Whether this rank, when it waits for something, should stop waiting; it, or any other, was asked to stop."""


@dataclass(frozen=True)
class Assembly:
    """What a stage hands to the common run."""

    stage: str
    """pretrain or finetune."""
    model: nn.Module
    """In fp32, with the weights a fresh run starts from."""
    objective: Objective
    loader: Loader
    max_steps: int
    accumulation: int
    """Micro-batches of a step, the same on every rank."""
    row_length: int
    """Most tokens of a row."""
    tokenizer_folder: Path
    prefetch_steps: int
    prefetch_threads: int = 1
    prefetch_bytes: int = 1 << 62
    evaluate: Callable[[Engine, ShouldLeave | None], dict[str, float]] | None = None
    """Collective; the metrics of the held-out data, the same on every rank; raises Interrupted when it is left early."""
    deciding_metric: str | None = None
    """The metric (larger is better) that chooses the best checkpoint; None keeps only the newest."""
    finish: Callable[[Engine, ShouldLeave | None], None] | None = None
    """Collective; called once when a complete run has its best weights loaded (predictions)."""
    finished_file: str | None = None
    """What `finish` leaves in the run folder: while it is missing, a run at its last step is not complete."""
    at_step: Callable[[int], None] | None = None
    """Told of every training step, before its forwards."""
    layer_shares: Callable[[int], Sequence[float]] | None = None
    """Of each layer, the share of the tokens that it sees at a step; None when all see all."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Kept in the manifest."""
    mean_context: float = 0.0
    """Tokens a token attends to on average where a layer sees whole documents, for FLOP counts."""
    notes: tuple[str, ...] = ()
    """Lines printed at the start."""


@contextmanager
def open_site(
    engine: EngineConfig, start: StartConfig, world: World, *, should_leave: ShouldLeave = never,
    fault: DstrainError | None = None,
) -> Iterator[Site]:  # fmt: skip
    """Collective. Choose device, precision and threads, join the processes, and leave them when done.

    Args:
        engine: device, precision, threads and cores.
        start: how long to wait.
        world: this process's place.
        should_leave: whether to stop waiting for ranks that have not come.
        fault: why this rank cannot take part, if it knows already; then it comes only to tell the others.

    Raises:
        DstrainError: this rank's host cannot take part, another's cannot, or ranks are missing.
        Interrupted: asked to stop while waiting.
    """
    device: str = "cpu"
    precision: Precision = "fp32"
    try:
        device = choose_device(engine.device)
        precision = choose_precision(engine.precision, device=device)
        take_gpu(device, world)
        taken = take_up(engine, world, os.environ)
        torch.set_num_threads(taken.threads)
        if world.is_first:
            _LOG.info("each rank has %s", describe(taken))
    except DstrainError as error:  # told to all ranks, which would wait for this one otherwise
        fault = fault or error
    if fault is not None and world.size == 1:
        raise fault
    word = Word(
        socket.gethostname(), device, precision, own_address(world, os.environ),
        fault=str(fault or ""), code=int(fault.exit_code) if fault is not None else 0,
    )  # fmt: skip
    waiting = Waiting(start.join_s, should_leave, expected_hosts(world, os.environ))
    control = start_processes(world, device=device, timeout_s=engine.timeout_s, word=word, waiting=waiting)
    try:
        yield Site(world, control, device, precision)
    finally:
        stop_processes(world)


def build_engine(config: AnyConfig, site: Site, parts: Assembly) -> Engine:
    """Collective. The engine that trains and scores an assembly, with what the stage leaves out of training steps.

    Raises:
        ConfigError: settings that do not go together.
    """
    engine = Engine(
        parts.model, parts.objective, config=config.engine, optimizer=config.optimizer, control=site.control,
        device=site.device, precision=site.precision, micro_batch=config.train.micro_batch, accumulation=parts.accumulation,
        seed=config.seed, row_length=parts.row_length, raw=config.deepspeed.values(), anatomy=anatomy(parts.model),
    )  # fmt: skip
    engine.at_step = parts.at_step
    return engine


def seed_weights(seed: int) -> None:
    """Make the random initial weights a function of the seed alone."""
    torch.manual_seed(derive(seed, "initial_weights") >> 1)
