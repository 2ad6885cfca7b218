"""The one engine: DeepSpeed on GPUs and, with gloo, on a CPU. Forward, backward, clip and step happen only here.

Target tokens are counted over all ranks and micro-batches before the loss is scaled, so the mean is right for any split
of the batch; the counters, the flags (stop, save) and the ledger ride on that same small agreement. Does not decide what is
trained on, when to save or when to stop.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from pydantic import ValidationError
from torch import Tensor, distributed, nn

from dstrain.base.control import ControlPlane
from dstrain.base.device import Precision
from dstrain.base.errors import ConfigError, DstrainError, MachineError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import Interrupted, LossParts, MicroBatch, Objective, StepData, StepFlags
from dstrain.base.seeds import derive
from dstrain.base.world import World
from dstrain.optim.adamw import OptimizerConfig, build_adamw, parameter_groups
from dstrain.train.ds_config import EngineConfig, deepspeed_config, warnings_for
from dstrain.train.op_cache import clear_stale_locks

_LOG = get_logger(__name__)

PARAMETER_PREFIX = "model.model."
"""What the engine's wrapping adds in front of the Hugging Face parameter names."""


NO_FLAGS = StepFlags()
_BATCHES_BETWEEN_POLLS = 4  # of an evaluation: a poll is one small agreement, a batch many milliseconds


class TrainedModule(nn.Module):
    """What DeepSpeed wraps: the model and its objective, so that the loss is computed inside one forward."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(loss sum, hits) of a micro-batch."""
        parts: LossParts = self._objective.loss(self.model, batch)
        return parts.loss_sum, parts.correct


@dataclass(frozen=True)
class StepTotals:
    """One optimizer step over all ranks."""

    loss: float
    accuracy: float
    gradient_norm: float
    applied: bool
    num_targets: int
    num_tokens: int
    num_rows: int
    padded_tokens: int
    ledger: int
    epoch: float
    flags: StepFlags
    """What any rank asked for before this step; the same on every rank."""
    damaged: tuple[tuple[str, int], ...]
    """(source, block) of blocks that some rank did without in this step; the same on every rank."""
    forward_backward_s: float
    step_s: float


def start_processes(world: World, *, device: str, timeout_s: int) -> ControlPlane:
    """Join the process group of the job and open the control plane.

    Args:
        world: this process's place.
        device: cpu or cuda.
        timeout_s: longest wait for a peer in a collective.

    Raises:
        MachineError: the rendezvous failed; the message names the address.
    """
    world.export(os.environ)
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DSTRAIN_DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 renamed; nothing a user could act on.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # The op serves inference only; building it needs a compiler and may wait for ever on a stale lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    clear_stale_locks()
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
        )
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"rank {world.rank} of {world.size} could not join at {world.master_addr}:{world.master_port}: {error}; "
            "is the port free, and do all ranks name the same host?"
        ) from None
    return ControlPlane(world, timeout_s=timeout_s)


def stop_processes(world: World) -> None:
    """Leave the process group cleanly.

    A world of one keeps it: DeepSpeed remembers groups in module state, and a second run in the same process (a notebook,
    a test) would find them destroyed. There is no peer to wait for, so nothing is lost.
    """
    if world.size > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


class Engine:
    """A DeepSpeed engine around a model and an objective."""

    def __init__(
        self, model: nn.Module, objective: Objective, *, config: EngineConfig, optimizer: OptimizerConfig, control: ControlPlane,
        device: str, precision: Precision, micro_batch: int, accumulation: int, seed: int, raw: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Collective. Build the engine around a model in fp32.

        In half precision DeepSpeed starts its fp32 masters from rounded weights; `checkpoint.fragments.EngineState` writes
        the exact ones into them.

        Args:
            model: a MaskedLanguageModel or SequenceClassifier in fp32.
            objective: turns its logits into a summed loss.
            config: the engine section.
            optimizer: the optimizer section.
            control: agreements between ranks.
            device: cpu or cuda.
            precision: resolved, never auto.
            micro_batch: rows of one forward.
            accumulation: micro-batches of one step, the same on every rank.
            seed: the run's seed, for dropout.
            raw: keys of the `deepspeed:` section.
        """
        self.control, self.device, self.precision, self.seed = control, device, precision, seed
        self.ds_config = deepspeed_config(
            config, precision=precision, clip_norm=optimizer.clip_norm, micro_batch=micro_batch,
            accumulation=accumulation, world_size=control.world.size, raw=raw,
        )  # fmt: skip
        if control.world.is_first:
            for warning in warnings_for(config, precision=precision, accumulation=accumulation):
                _LOG.warning("%s", warning)
        module = TrainedModule(model, objective)
        guarded = config.zero_stage == 0 and precision == "fp32"
        groups = parameter_groups(module.named_parameters(), weight_decay=optimizer.weight_decay)
        client = build_adamw(optimizer, groups, guarded=guarded)
        _skip_memory_reports()
        try:
            self.engine, _, _, _ = deepspeed.initialize(model=module, optimizer=client, config=self.ds_config)
        except (deepspeed.runtime.config.DeepSpeedConfigError, ValidationError) as error:
            raise ConfigError(f"deepspeed: refused by DeepSpeed {deepspeed.__version__}: {error}") from None

    @property
    def model(self) -> nn.Module:
        """The wrapped model (sharded at stage 3)."""
        module: nn.Module = self.engine.module.model
        return module

    def train_step(
        self, data: StepData | DstrainError | Interrupted, *, step: int, learning_rate: float, flags: StepFlags = NO_FLAGS
    ) -> StepTotals:  # fmt: skip
        """Collective. One optimizer step.

        Args:
            data: this rank's micro-batches, the same number on every rank; or why this rank has none, which all ranks
                learn in the same agreement, so that none is left waiting in a collective.
            step: steps done before this one; keys dropout.
            learning_rate: of this step.
            flags: what this rank asks for; all ranks learn of it.

        Raises:
            DstrainError: this rank's data fault; PeerError where another rank had one.
            Interrupted: some rank did not wait for its data, because it was asked to stop; no rank took the step.
        """
        started = time.perf_counter()
        counts = self._agree(data, flags)
        if isinstance(data, (DstrainError, Interrupted)):  # _agree has raised it already
            raise data
        self._accumulate(len(data.micro_batches))
        scale = self.control.world.size / max(1, counts.num_targets)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        correct = torch.zeros((), dtype=torch.float32, device=self.device)
        backward_done = started
        for number, batch in enumerate(data.micro_batches):
            torch.manual_seed(derive(self.seed, "dropout", step, self.control.world.rank, number) >> 1)
            loss_sum, hits = self.engine(batch.to(self.device))
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
            loss += loss_sum.detach()
            correct += hits
            backward_done = time.perf_counter()
            self.engine.step()
        applied = bool(self.engine.was_step_applied())
        totals = torch.stack([loss, correct])
        if self.control.world.size > 1:
            distributed.all_reduce(totals)
        loss_total, correct_total = totals.tolist()
        targets = max(1, counts.num_targets)
        return StepTotals(
            loss=loss_total / targets,
            accuracy=correct_total / targets,
            gradient_norm=float(self.engine.get_global_grad_norm() or 0.0),
            applied=applied,
            num_targets=counts.num_targets,
            num_tokens=counts.num_tokens,
            num_rows=counts.num_rows,
            padded_tokens=counts.padded_tokens,
            ledger=counts.ledger,
            epoch=data.epoch,
            flags=counts.flags,
            damaged=counts.damaged,
            forward_backward_s=backward_done - started,
            step_s=time.perf_counter() - backward_done,
        )

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[MicroBatch], *, should_leave: Callable[[], bool] | None = None
    ) -> tuple[float, float, int]:
        """Collective. Mean loss, accuracy and target count over all ranks' batches; every rank passes equally many.

        Args:
            batches: this rank's share.
            should_leave: whether this rank was asked to stop; given on every rank or on none.

        Raises:
            Interrupted: some rank was asked to stop; on all ranks after the same batch.
        """
        self.engine.eval()
        totals = [0.0, 0.0, 0.0]
        try:
            for number, batch in enumerate(batches):
                self._leave_together(should_leave, number)
                loss_sum, hits = self.engine(batch.to(self.device))
                totals = [totals[0] + float(loss_sum), totals[1] + float(hits), totals[2] + batch.num_targets]
        finally:
            self.engine.train()
        loss, correct, targets = self.control.sum_floats(totals)
        return loss / max(1.0, targets), correct / max(1.0, targets), int(targets)

    @torch.no_grad()
    def predict(self, batches: Sequence[MicroBatch], *, should_leave: Callable[[], bool] | None = None) -> list[Tensor]:
        """Collective. fp32 logits of each batch, on the CPU; every rank passes equally many batches.

        Args:
            batches: this rank's share.
            should_leave: as in `evaluate`.

        Raises:
            Interrupted: as in `evaluate`.
        """
        self.engine.eval()
        found = []
        try:
            for number, batch in enumerate(batches):
                self._leave_together(should_leave, number)
                found.append(self.engine.module.model(batch.to(self.device)).float().cpu())
        finally:
            self.engine.train()
        return found

    def _leave_together(self, should_leave: Callable[[], bool] | None, number: int) -> None:
        """Collective every few batches: leave a long evaluation when any rank was asked to."""
        if should_leave is not None and number % _BATCHES_BETWEEN_POLLS == 0:
            if not self.control.all_true(not should_leave()):
                raise Interrupted("asked to stop during an evaluation")

    def _accumulate(self, num_micro: int) -> None:
        """Take steps of another number of micro-batches (a batch-size phase began)."""
        if num_micro == self.engine.gradient_accumulation_steps():
            return
        ranks = self.engine.dp_world_size
        self.engine.set_train_batch_size(num_micro * self.engine.train_micro_batch_size_per_gpu() * ranks)
        self.engine.micro_steps = 0  # DeepSpeed 0.19 finds a step's end by counting micro-batches since the start
        if hasattr(self.engine.optimizer, "gradient_accumulation_steps"):
            self.engine.optimizer.gradient_accumulation_steps = num_micro

    def _agree(self, data: StepData | DstrainError | Interrupted, flags: StepFlags) -> _Counts:
        fault = data if isinstance(data, DstrainError) else None
        left = isinstance(data, Interrupted)
        if isinstance(data, (DstrainError, Interrupted)):
            data = StepData((), num_rows=0, padded_tokens=0, ledger=0, epoch=0.0)
        local = (
            sum(b.num_targets for b in data.micro_batches),
            sum(b.num_tokens for b in data.micro_batches),
            data.num_rows,
            data.padded_tokens,
            data.ledger & 0xFFFFFFFF,
            data.ledger >> 32,
            int(fault is not None),
            int(left),
            len(data.damaged),
            *map(int, astuple(flags)),
        )
        targets, tokens, rows, padded, low, high, faults, leaving, damages, *asked = self.control.sum(local)
        if faults:
            self.control.together(lambda: _raise(fault))
        if leaving:
            raise Interrupted("asked to stop while waiting for data")
        damaged = self._all_damaged(data) if damages else ()
        agreed = StepFlags(*(number > 0 for number in asked))
        return _Counts(targets, tokens, rows, padded, (low + (high << 32)) % (1 << 63), agreed, damaged)

    def _all_damaged(self, data: StepData) -> tuple[tuple[str, int], ...]:
        """Collective. Blocks that any rank could not read, the same tuple on every rank."""
        found = self.control.gather_json([list(entry) for entry in data.damaged])
        return tuple(sorted({(str(source), int(block)) for entries in found for source, block in entries}))


def _skip_memory_reports() -> None:
    """Keep DeepSpeed's bf16 optimizer from reporting memory six times while it is built.

    Each report collects all garbage of the process: about two seconds of every start, for lines nobody asked for
    (0.19.8, runtime/bf16_optimizer.py, `see_memory_usage(..., force=True)`).
    """
    module = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    if hasattr(module, "see_memory_usage"):
        setattr(module, "see_memory_usage", lambda *_, **__: None)  # noqa: B010  (mypy knows no such name to assign)


def _raise(fault: DstrainError | None) -> None:
    if fault is not None:
        raise fault


@dataclass(frozen=True)
class _Counts:
    num_targets: int
    num_tokens: int
    num_rows: int
    padded_tokens: int
    ledger: int
    flags: StepFlags
    damaged: tuple[tuple[str, int], ...]
