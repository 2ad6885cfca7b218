"""The engine's settings, and DeepSpeed's JSON made from them: every key explicit, because defaults change in patch releases.

One thread of truth: what the run's YAML owns cannot be set again under `deepspeed:`; unknown and removed keys are refused
with their replacement, since DeepSpeed itself accepts a misspelt top-level key in silence. Does not import deepspeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from dstrain.base.config import Config
from dstrain.base.device import Precision
from dstrain.base.errors import ConfigError
from dstrain.base.rank_settings import RankSettings

MULTI_RANK_BUCKETS = True
"""Stages 1 and 2: reduce a bucket that several ranks own by one all-reduce. False reduces to each owner, a third fewer bytes in more
collectives; which is faster on NCCL is not known, so DeepSpeed's default stays."""
PERSISTENT_ELEMENTS = 100_000
"""Stage 3: smaller parameters stay gathered on every rank."""
REUSE_ELEMENTS = 1_000_000_000
"""Stage 3: so many elements of gathered weights may wait on a rank for their next use."""

_PASSED_THROUGH = ("compile", "aio", "timers", "comms_logger", "flops_profiler", "zero_optimization")
_PASSED_THROUGH_ZERO = ("offload_optimizer", "offload_param")
_OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "communication_data_type": "engine.precision",
    "checkpoint": "checkpoint",
    "tensorboard": "monitor",
    "wandb": "monitor",
    "csv_monitor": "monitor",
    "comet": "monitor",
    "steps_per_print": "monitor.log_every",
}
_REMOVED = {
    "elasticity": ("0.19.8", "dstrain's checkpoints load at any world size and keep the global batch"),
    "progressive_layer_drop": ("0.19.8", "layer_dropping"),
    "curriculum_learning": ("0.19.8", "data.phases and data.segment_warmup"),
    "nebula": ("0.19.7", "dstrain's checkpoints"),
    "compression_training": ("0.19.7", "none"),
    "amp": ("0.19.7", "engine.precision"),
    "sparse_attention": ("0.19.7", "model.attention: unpadded"),
    "sparse_gradients": ("0.19.7", "none"),
    "eigenvalue": ("0.19.7", "none"),
    "quantize_training": ("0.19.7", "none"),
    "graph_harvesting": ("0.19.7", "none"),
}
_REFUSED = (
    "data_efficiency", "dataloader_drop_last", "autotuning", "datastates_ckpt", "pipeline", "hybrid_engine",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "managed_gradient_accumulation",
    "zero_allow_untested_optimizer", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc",
)  # fmt: skip


class EngineConfig(RankSettings):
    """The DeepSpeed engine: sharding, precision, device; and how its ranks sit on their machines."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters. 1 fits every encoder
    below about 3 B parameters on 80 GB; 2 and 3 only cost time there."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, else fp32 (fp16 on GPUs older than that)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs when this process sees one. cuda makes a missing GPU an error instead of a slow CPU run."""
    bucket_elements: int = Field(default=50_000_000, ge=1_000)
    """Elements of one reduce or all-gather bucket; 5e7 is 100 MB in bf16."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    """blocks: torch.compile fuses what lies between the matrices of each encoder block, and micro-batches are filled up to a
    few fixed shapes. auto: blocks on a GPU at stages 0 to 2; off on a CPU, where matrices take nearly all the time."""
    initial_loss_scale_power: int = Field(default=16, ge=0, le=32)
    """fp16 only: the dynamic loss scale starts at 2 to this power."""


class RawDeepSpeed(Config):
    """Keys handed to DeepSpeed as they are, at the user's risk; those that dstrain owns are refused."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _check(self) -> RawDeepSpeed:
        for key, value in self.values().items():
            check_raw_key(key, value)
        return self

    def values(self) -> dict[str, Any]:
        """The raw keys."""
        return dict(self.__pydantic_extra__ or {})


def check_raw_key(key: str, value: Any) -> None:
    """Raise ValueError unless `deepspeed.<key>` may be passed through."""
    if key in _OWNED:
        raise ValueError(f"deepspeed.{key}: set {_OWNED[key]} instead; it has one home in the configuration")
    if key in _REMOVED:
        version, instead = _REMOVED[key]
        raise ValueError(f"deepspeed.{key}: removed from DeepSpeed in {version}; instead: {instead}")
    if key in _REFUSED:
        raise ValueError(f"deepspeed.{key}: dstrain decides this; leave it out")
    if key not in _PASSED_THROUGH:
        near = difflib.get_close_matches(key, [*_PASSED_THROUGH, *_OWNED, *_REMOVED], n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" Passed through: {', '.join(_PASSED_THROUGH)}"
        raise ValueError(f"deepspeed.{key}: not a key that dstrain passes through.{hint}")
    if key == "zero_optimization":
        unknown = sorted(set(value) - set(_PASSED_THROUGH_ZERO)) if isinstance(value, Mapping) else ["(not a mapping)"]
        if unknown:
            raise ValueError(
                f"deepspeed.zero_optimization.{unknown[0]}: set engine.zero_stage and engine.bucket_elements instead; "
                f"passed through: {', '.join(_PASSED_THROUGH_ZERO)}"
            )
    if "auto" in str(value).split("'"):
        raise ValueError(f'deepspeed.{key}: "auto" is a habit of other tools; write the value')


def deepspeed_config(
    config: EngineConfig, *, precision: Precision, clip_norm: float, micro_batch: int, accumulation: int, world_size: int,
    raw: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """DeepSpeed's JSON for a run.

    Args:
        config: the engine section.
        precision: resolved, never auto.
        clip_norm: largest gradient norm; at stage 0 in fp32 dstrain's optimizer clips, so 0 is written.
        micro_batch: rows of one forward.
        accumulation: micro-batches of one step.
        world_size: ranks.
        raw: keys of `deepspeed:`.
    """
    stage = config.zero_stage
    own_clipping = stage == 0 and precision == "fp32"
    result: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        "gradient_clipping": 0.0 if own_clipping else clip_norm,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": precision,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {
            "enabled": precision == "bf16",
            "check_grad_overflow": True,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": config.initial_loss_scale_power,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            "auto_cast": False,
        },
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": None if stage == 0 and precision != "fp32" else "fp32"},
        "zero_optimization": _zero(config),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_python_gc": False,
        "tensorboard": {"enabled": False},
        "wandb": {"enabled": False},
        "csv_monitor": {"enabled": False},
        "comms_logger": {"enabled": False},
        "flops_profiler": {"enabled": False},
    }
    for key, value in (raw or {}).items():
        result[key] = {**result[key], **value} if isinstance(value, Mapping) and key in result else value
    return result


def _zero(config: EngineConfig) -> dict[str, Any]:
    bucket = config.bucket_elements
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,  # its history of silent corruption is in docs/deepspeed.md
        "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": MULTI_RANK_BUCKETS,
        "contiguous_gradients": True,
        "allgather_partitions": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "ignore_unused_parameters": True,
        "elastic_checkpoint": False,
    }
    if config.zero_stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": REUSE_ELEMENTS,
            "stage3_max_reuse_distance": REUSE_ELEMENTS,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        }
    return zero


def warnings_for(config: EngineConfig, *, precision: Precision, accumulation: int) -> list[str]:
    """Set-ups that work but cost money or accuracy, in words."""
    found: list[str] = []
    if config.zero_stage in (2, 3) and accumulation > 1:
        found.append(
            f"engine.zero_stage: {config.zero_stage} reduces gradients at each of the {accumulation} micro-batches of a step; "
            "stage 1 reduces once and fits every encoder below about 3 B parameters"
        )
    if config.zero_stage == 0 and precision != "fp32" and accumulation > 1:
        found.append(f"engine.zero_stage: 0 accumulates gradients in {precision}; stage 1 accumulates in fp32")
    return found


def check_overlay(data: Any, *, source: str) -> dict[str, Any]:
    """Validate a `--deepspeed_config` file's content as raw keys.

    Raises:
        ConfigError: not a mapping, or a key that is not passed through.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a DeepSpeed configuration is a JSON object, found {type(data).__name__}")
    for key, value in data.items():
        try:
            check_raw_key(key, value)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
    return data
