"""The one engine: DeepSpeed on GPUs and, with gloo, on a CPU. Forward, backward, clip and step happen only here.

Target tokens are counted over all ranks and micro-batches before the loss is scaled, so the mean is right for any split
of the batch; the counters, the flags (stop, save) and the ledger ride on that same small agreement. Does not decide what is
trained on, when to save or when to stop.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
from pydantic import ValidationError
from torch import Tensor, distributed, nn

from dstrain.base.control import ControlPlane
from dstrain.base.device import Precision, gpu_index
from dstrain.base.errors import ConfigError, MachineError, PeerGoneError
from dstrain.base.logs import get_logger
from dstrain.base.peer_loss import is_peer_loss
from dstrain.base.protocols import Interrupted, LossParts, MicroBatch, Objective, StepData, StepFlags
from dstrain.base.rendezvous import open_store
from dstrain.base.roll_call import Waiting, Word, call_roll
from dstrain.base.seeds import derive
from dstrain.base.world import World
from dstrain.checkpoint.fragments import EngineState
from dstrain.models.anatomy import Anatomy
from dstrain.models.blocks import compile_blocks
from dstrain.optim.build import OPTIMIZERS, build_optimizer
from dstrain.optim.config import OptimizerConfig
from dstrain.optim.fragment_optimizer import bind_if_needed
from dstrain.optim.groups import parameter_groups
from dstrain.train.agreement import Agreed, AnyData, agree
from dstrain.train.compiling import choose_compiling, few_shapes
from dstrain.train.device_feed import DeviceFeed
from dstrain.train.ds_config import EngineConfig, deepspeed_config, warnings_for
from dstrain.train.memory import advice_for, memory_faults_named
from dstrain.train.op_cache import clear_stale_locks
from dstrain.train.step_gate import Judge, StepGate
from dstrain.train.stopwatch import Stopwatch
from dstrain.train.traffic import Sharding

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
    forward_s: float
    """In forwards: this rank's own work, while the rest of a step also waits for other ranks."""
    forward_backward_s: float
    step_s: float


def start_processes(
    world: World, *, device: str, timeout_s: int, word: Word | None = None, waiting: Waiting | None = None
) -> ControlPlane:  # fmt: skip
    """Join the process group of the job and open the control plane.

    Args:
        world: this process's place.
        device: cpu, or cuda after `take_gpu`.
        timeout_s: longest wait for a peer in a collective.
        word: what this rank says of itself; with a fault in it all ranks leave. Default: that it can take part.
        waiting: for ranks that have not come yet. Default: as long as for a peer in a collective.

    Raises:
        MachineError: this rank's fault, or a port that is taken.
        PeerError: another rank cannot take part.
        PeerGoneError: another rank did not come or has gone; those that did not come are named.
        Interrupted: some rank was asked to stop while waiting.
    """
    word, waiting = word or Word(socket.gethostname(), device), waiting or Waiting(timeout_s)
    world.export(os.environ)
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DSTRAIN_DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 renamed; nothing a user could act on.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # The op serves inference only; building it needs a compiler and may wait for ever on a stale lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    clear_stale_locks()
    backend, timeout = "nccl" if device == "cuda" else "gloo", timedelta(seconds=timeout_s)
    try:
        if not distributed.is_initialized():
            store = open_store(world, join_s=waiting.join_s, timeout_s=timeout_s, should_leave=waiting.should_leave)
            call_roll(store, world, word, waiting)
            distributed.init_process_group(
                backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
            )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except (RuntimeError, ValueError) as error:
        fault = PeerGoneError if is_peer_loss(error) else MachineError
        raise fault(
            f"rank {world.rank} of {world.size} could not join at {world.master_addr}:{world.master_port}: {error}; "
            "is the port free, do all ranks name the same host, and have all been started?"
        ) from None
    return ControlPlane(world, timeout_s=timeout_s)


def take_gpu(device: str, world: World) -> None:
    """Make this rank's of the visible GPUs the one in use, and use it once; nothing on a CPU.

    Before the ranks meet: one whose GPU fails in the first collective leaves the others waiting in it.

    Raises:
        MachineError: there are fewer GPUs than ranks, or this one does not answer.
    """
    if device != "cuda":
        return
    gpu = gpu_index(
        world.local_rank, local_size=world.local_size, visible=torch.cuda.device_count(),
        per_task=world.launcher == "srun",
    )  # fmt: skip
    try:
        torch.cuda.set_device(gpu)
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        raise MachineError(
            f"GPU {gpu} of this machine cannot be used ({str(error).splitlines()[0]}): look at nvidia-smi and the kernel's "
            "log there, end what else uses it, or leave the host out"
        ) from None


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
        device: str, precision: Precision, micro_batch: int, accumulation: int, seed: int, row_length: int | None = None,
        raw: Mapping[str, Any] | None = None, anatomy: Anatomy | None = None,
    ) -> None:  # fmt: skip
        """Collective. Build the engine around a model in fp32.

        In half precision DeepSpeed starts its fp32 masters from rounded weights; `fragments` writes the exact ones into them.

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
            row_length: most tokens of a row, where rows are full ones; compiled blocks then see one shape.
            raw: keys of the `deepspeed:` section.
            anatomy: of the model, for advice when memory runs out.
        """
        self.control, self.device, self.precision, self.seed = control, device, precision, seed
        self.ds_config = deepspeed_config(
            config, precision=precision, clip_norm=optimizer.clip_norm, micro_batch=micro_batch,
            accumulation=accumulation, world_size=control.world.size, raw=raw,
        )  # fmt: skip
        if control.world.is_first:
            for warning in warnings_for(config, precision=precision, accumulation=accumulation):
                _LOG.warning("%s", warning)
        self.compiling = choose_compiling(config, device=device, unpadded=getattr(model, "attention", "") == "unpadded")
        shape = None
        if self.compiling.enabled:
            compile_blocks(model)
            shape = partial(few_shapes, usual_tokens=micro_batch * (row_length or 0))
        self._feed = DeviceFeed(device, shape=shape)
        module = TrainedModule(model, objective)
        guarded = config.zero_stage == 0 and precision == "fp32"
        client = build_optimizer(optimizer, parameter_groups(module, optimizer), guarded=guarded)
        _refuse_offload(optimizer, self.ds_config)
        _skip_memory_reports()
        _admit_own_optimizers()
        self._micro_batch, self._anatomy = micro_batch, anatomy
        self._sharding = Sharding(
            config.zero_stage,
            precision,
            control.world.size,
            accumulation,
            config.bucket_elements,
            optimizer=optimizer.kind,
        )
        try:
            with self._memory_faults("the engine", []):
                self.engine, _, _, _ = deepspeed.initialize(model=module, optimizer=client, config=self.ds_config)
        except (deepspeed.runtime.config.DeepSpeedConfigError, ValidationError) as error:
            raise ConfigError(f"deepspeed: refused by DeepSpeed {deepspeed.__version__}: {error}") from None
        self._loss_scale, self._left_out = 1.0, False
        self.fragments = EngineState(self.engine, prefix=PARAMETER_PREFIX)
        bind_if_needed(client, self.fragments, control, replicated=config.zero_stage == 0)
        self._gate = StepGate(self._gradient_norm)
        client.gate = self._gate
        self._client = client
        self.at_step: Callable[[int], None] | None = None
        """Called with the steps done when the forwards of a training step begin."""

    @property
    def model(self) -> nn.Module:
        """The wrapped model (sharded at stage 3)."""
        module: nn.Module = self.engine.module.model
        return module

    def show_updates(self, look: Callable[[list[Tensor]], None]) -> None:
        """Show every update to `look`, before it is done: fp32 tensors as DeepSpeed keeps them, with their gradients.

        Called on every rank with what that rank updates, once or several times a step, and not at all for a step whose update
        is left out.
        """
        self._client.before_update = look

    def weights(self) -> list[Tensor]:
        """The parameters that training computes with, in the model's order."""
        return [p.detach() for p in self.engine.module.parameters()]

    def train_step(
        self, data: AnyData, *, step: int, learning_rate: float, flags: StepFlags = NO_FLAGS, judge: Judge | None = None
    ) -> StepTotals:  # fmt: skip
        """Collective. One optimizer step.

        Args:
            data: this rank's micro-batches, the same number on every rank; or why this rank has none, which all ranks
                learn in the same agreement, so that none is left waiting in a collective.
            step: steps done before this one; keys dropout.
            learning_rate: of this step.
            flags: what this rank asks for; all ranks learn of it.
            judge: may leave the update out, once loss and gradient norm are known; None admits every finite one.

        Raises:
            DstrainError: this rank's data fault; PeerError where another rank had one.
            Interrupted: some rank did not wait for its data, because it was asked to stop; no rank took the step.
            ConfigError: this rank is out of memory.
            MachineError: ranks have judged the step before differently.
        """
        started = time.perf_counter()
        counts = agree(self.control, data, flags, left_out=self._left_out)
        assert isinstance(data, StepData)  # agree has raised anything else
        self._accumulate(len(data.micro_batches))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        with self._memory_faults(f"step {step + 1}", data.micro_batches):
            loss, accuracy, forward_s = self._forward_backward(data, counts, step=step)
            backward_done = time.perf_counter()
            self._gate.prepare(judge, loss=loss)
            self._loss_scale = self._stage_0_scale()
            self.engine.step()
        admitted = self._gate.finish()
        self._left_out = not admitted
        return StepTotals(
            loss=loss,
            accuracy=accuracy,
            gradient_norm=self._gate.gradient_norm(),
            applied=admitted and bool(self.engine.was_step_applied()),
            num_targets=counts.num_targets,
            num_tokens=counts.num_tokens,
            num_rows=counts.num_rows,
            padded_tokens=counts.padded_tokens,
            ledger=counts.ledger,
            epoch=data.epoch,
            flags=counts.flags,
            damaged=counts.damaged,
            forward_s=forward_s,
            forward_backward_s=backward_done - started,
            step_s=time.perf_counter() - backward_done,
        )

    def _forward_backward(self, data: StepData, counts: Agreed, *, step: int) -> tuple[float, float, float]:
        """Collective. Gradients of a step, its loss and accuracy over all ranks, and this rank's seconds in forwards.

        Nothing is updated yet.
        """
        stopwatch = Stopwatch(self.device)
        if self.at_step is not None:
            self.at_step(step)
        scale = self.control.world.size / max(1, counts.num_targets)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        correct = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, batch in enumerate(self._feed(data.micro_batches)):
            if number:
                self.engine.step()  # closes the micro-batch before; only the last one's step updates anything
            torch.manual_seed(derive(self.seed, "dropout", step, self.control.world.rank, number) >> 1)
            with stopwatch:
                loss_sum, hits = self.engine(batch)
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
            loss += loss_sum.detach()
            correct += hits
        totals = torch.stack([loss, correct])
        if self.control.world.size > 1:
            distributed.all_reduce(totals)
        loss_total, correct_total = totals.tolist()  # waits for the device, so the stopwatch need not
        targets = max(1, counts.num_targets)
        return loss_total / targets, correct_total / targets, stopwatch.seconds()

    def _memory_faults(self, what: str, batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        """Out of memory inside becomes a fault that says what the plan says about these micro-batches, or about none."""
        advice = None
        if self._anatomy is not None:
            advice = functools.partial(
                advice_for, self._anatomy, self._sharding, batches, micro_batch=self._micro_batch, device=self.device,
                ranks_here=self.control.world.local_size,
            )  # fmt: skip
        rows = self._micro_batch if batches else None
        return memory_faults_named(what=what, micro_batch=rows, device=self.device, advice=advice)

    def _gradient_norm(self) -> float:
        """Global, before clipping; 0 where DeepSpeed does not compute it. Known from DeepSpeed's step on."""
        norm = getattr(self.engine.optimizer, "_global_grad_norm", None)
        return 0.0 if norm is None else float(norm) / self._loss_scale

    def _stage_0_scale(self) -> float:
        """The loss scale that is still in the gradient norm: DeepSpeed takes it out at stages 1 to 3 only."""
        scaling = getattr(self.engine.optimizer, "loss_scale_config", None)
        return float(scaling.cur_scale) if scaling is not None and self.precision == "fp16" else 1.0

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
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        num_targets = 0
        try:
            for number, batch in enumerate(self._feed(batches)):
                self._leave_together(should_leave, number)
                with self._memory_faults("an evaluation", [batch]):
                    found += torch.stack(self.engine(batch))
                num_targets += batch.num_targets
        finally:
            self.engine.train()
        loss, correct, targets = self.control.sum_floats([*found.tolist(), num_targets])
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
            for number, (batch, given) in enumerate(zip(self._feed(batches), batches)):
                self._leave_together(should_leave, number)
                with self._memory_faults("an evaluation", [batch]):
                    logits = self.engine.module.model(batch)
                found.append(logits[: len(given.targets)].float().cpu())
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


def _admit_own_optimizers() -> None:
    """Tell DeepSpeed that dstrain's optimizers are right on partitions; it looks them up by exact type (0.19.8, zero/utils.py)."""
    known = importlib.import_module("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS
    known += [kind for kind in OPTIMIZERS if kind not in known]


def _refuse_offload(optimizer: OptimizerConfig, ds_config: Mapping[str, Any]) -> None:
    """Only AdamW is element-wise, and so indifferent to partitions that lie on the host."""
    if optimizer.kind != "adamw" and ds_config["zero_optimization"].get("offload_optimizer"):
        raise ConfigError(
            f"optimizer.kind: {optimizer.kind} does not go with deepspeed.zero_optimization.offload_optimizer: "
            "use kind: adamw, or leave offloading out"
        )


def _skip_memory_reports() -> None:
    """Keep DeepSpeed's bf16 optimizer from reporting memory six times while it is built.

    Each report collects all garbage of the process: about two seconds of every start, for lines nobody asked for
    (0.19.8, runtime/bf16_optimizer.py, `see_memory_usage(..., force=True)`).
    """
    module = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    if hasattr(module, "see_memory_usage"):
        setattr(module, "see_memory_usage", lambda *_, **__: None)  # noqa: B010  (mypy knows no such name to assign)
