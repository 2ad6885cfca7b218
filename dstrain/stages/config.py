"""The whole configuration of a run: the rooms' sections, nested, and the pairs that only the whole can judge."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.checkpoint.writer import CheckpointConfig
from dstrain.data.config import DataConfig
from dstrain.health.consistency import ConsistencyConfig
from dstrain.health.start_config import StartConfig
from dstrain.health.stop_config import StopConfig
from dstrain.health.stragglers import StragglerConfig
from dstrain.health.watchdog import WatchdogConfig
from dstrain.models.config import ModelConfig
from dstrain.models.layer_dropping import LayerDroppingConfig
from dstrain.models.token_dropping import TokenDroppingConfig
from dstrain.monitor.config import MonitorConfig
from dstrain.objectives.mlm import MlmConfig
from dstrain.optim.config import OptimizerConfig
from dstrain.optim.schedule import ScheduleConfig
from dstrain.tasks.spec import TaskConfig
from dstrain.train.ds_config import EngineConfig, RawDeepSpeed
from dstrain.train.loop_config import LoopConfig


class PretrainLoopConfig(LoopConfig):
    """The loop of a pretraining run."""

    max_steps: int = Field(ge=1)
    """Optimizer steps of the whole run; the schedule ends here."""


class FinetuneLoopConfig(LoopConfig):
    """The loop of a fine-tuning run."""

    global_batch: int = Field(default=32, ge=1)
    """Examples of one optimizer step, over all ranks."""
    micro_batch: int = Field(default=32, ge=1)
    """Most examples of one forward on one rank."""
    epochs: float = Field(default=3.0, gt=0.0)
    """Passes over the training file."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps instead of epochs."""


class RunConfig(Config):
    """What every training run has."""

    run_folder: Path
    """Everything the run writes goes here; starting again with the same folder resumes."""
    seed: int = Field(default=0, ge=0)
    """Order, masks, initial weights and dropout follow from it."""
    model: ModelConfig
    """The network."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    start: StartConfig = StartConfig()
    """Checks before the first step."""
    stop: StopConfig = StopConfig()
    """Time limits, grace and budgets."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """When a rank counts as hung."""
    consistency: ConsistencyConfig = ConsistencyConfig()
    """How often replicated weights are compared."""
    stragglers: StragglerConfig = StragglerConfig()
    """When a rank counts as slow."""
    monitor: MonitorConfig = MonitorConfig()
    """Numbers out."""
    deepspeed: RawDeepSpeed = RawDeepSpeed()
    """Raw DeepSpeed keys that dstrain does not own, passed through."""

    @model_validator(mode="after")
    def _clock(self) -> RunConfig:
        budget = {"tokens": "max_tokens", "hours": "max_training_hours"}.get(self.schedule.clock)
        if budget is not None and getattr(self.stop, budget) is None:
            raise ValueError(f"schedule.clock: {self.schedule.clock} runs against stop.{budget}, which is not set")
        return self


class PretrainConfig(RunConfig):
    """A pretraining run: one YAML."""

    data: DataConfig
    """The shards and their order."""
    objective: MlmConfig = MlmConfig()
    """What is predicted."""
    token_dropping: TokenDroppingConfig | None = None
    """Middle layers see a random part of the tokens. Default: all of them."""
    layer_dropping: LayerDroppingConfig | None = None
    """Later layers are left out more and more often. Default: never."""
    train: PretrainLoopConfig
    """Batch, length, rhythm."""

    @model_validator(mode="after")
    def _pairs(self) -> PretrainConfig:
        batch, lanes, steps = self.train.global_batch, self.data.lanes, self.train.max_steps
        if lanes is not None and batch % lanes:
            raise ValueError(f"data.lanes={lanes} does not divide train.global_batch={batch}; leave data.lanes out")
        _check_schedule(self.schedule, steps)
        if self.layer_dropping is not None and self.engine.zero_stage == 3:
            raise ValueError(
                "layer_dropping: engine.zero_stage: 3 fetches layers in an order that it has recorded; use stage 0, 1 or 2"
            )
        return self


class FinetuneConfig(RunConfig):
    """A fine-tuning run: one YAML."""

    task: TaskConfig
    """Files, columns, labels."""
    tokenizer: Path | None = None
    """Tokenizer folder; default: the one kept with model.init_from."""
    train: FinetuneLoopConfig = FinetuneLoopConfig()
    """Batch, length, rhythm."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5, betas=(0.9, 0.999))
    """AdamW with BERT's fine-tuning rate."""
    prefetch_steps: int = Field(default=2, ge=0, le=64)
    """Steps made ahead by a background thread."""

    @model_validator(mode="after")
    def _pairs(self) -> FinetuneConfig:
        if self.model.init_from_smaller is not None:
            raise ValueError(
                "model.init_from_smaller begins a pretraining run; fine-tune from its result with model.init_from"
            )
        if self.tokenizer is None and self.model.init_from is None:
            raise ValueError("tokenizer: give a tokenizer folder, or model.init_from, which brings its own")
        if self.train.max_steps is not None:
            _check_schedule(self.schedule, self.train.max_steps)
        return self


def _check_schedule(schedule: ScheduleConfig, max_steps: int) -> None:
    warmup, decay = schedule.warmup_steps or 0, schedule.decay_steps or 0
    if warmup + decay > max_steps:
        parts = f"schedule.warmup_steps={warmup}" + (f" and schedule.decay_steps={decay}" if decay else "")
        raise ValueError(f"{parts} are longer than train.max_steps={max_steps}")
