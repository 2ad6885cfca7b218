"""What a run's configuration asks for, as numbers: model, row, batch, length. Reads the shards' manifests where they are there already.

Where the shards are not built yet, vocabulary and documents are assumed, and the assumption is said. Builds no model but on the meta
device and reads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstrain.base.device import Precision
from dstrain.base.errors import ConfigError, DstrainError
from dstrain.base.locations import RemoteUrl, parse_location
from dstrain.models.anatomy import Anatomy
from dstrain.models.huggingface import anatomy_without_weights
from dstrain.planner.devices import Device
from dstrain.stages.config import PretrainConfig
from dstrain.stages.initial import find_origin
from dstrain.stages.training_data import TRAIN, load_tokenizer, mean_context, open_split

ASSUMED_VOCABULARY = 32768


@dataclass(frozen=True)
class Workload:
    """A pretraining run by numbers."""

    anatomy: Anatomy
    precision: Precision
    stage: int
    sequence_length: int
    """Tokens of a row; rows are packed, so all of them count as real."""
    context: float
    """Tokens that a token attends to where a layer sees whole documents."""
    mask_rate: float
    """The highest of the run: memory needs it."""
    global_batch: int
    """Rows of a step."""
    micro_batch: int
    """Most rows of a forward, as configured."""
    max_steps: int
    optimizer: str
    compile: str
    """engine.compile."""
    bucket_elements: int
    longest_save_interval_s: float
    device_hours_per_failure: float
    assumptions: tuple[str, ...] = ()
    """What was not known, in words."""

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.max_steps * self.global_batch * self.sequence_length


def workload(
    config: PretrainConfig, device: Device, *, vocabulary: int | None = None, context: float | None = None
) -> Workload:
    """Read a configuration.

    Args:
        config: of the run.
        device: decides what precision `auto` becomes.
        vocabulary: of a tokenizer that is not there yet.
        context: mean tokens that a token attends to, for shards that are not there yet.

    Raises:
        ConfigError: the model cannot be built.
    """
    assumptions: list[str] = []
    known = None if vocabulary is not None and context is not None else _read_shards(config)
    if vocabulary is None:
        vocabulary = known[0] if known is not None else _assumed_vocabulary(config, assumptions)
    if context is None:
        context = known[1] if known is not None else _assumed_context(config, assumptions)
    origin = find_origin(config.model.init_from)
    anatomy = anatomy_without_weights(
        config.model, vocab_size=vocabulary, architecture=origin.architecture if origin else None
    )
    if config.optimizer.kind in ("muon", "lamb"):
        assumptions.append(
            f"an update and traffic like AdamW's; {config.optimizer.kind} also exchanges norms or matrices"
        )
    if anatomy.quadratic:
        assumptions.append("this model runs padded: each document is a row of its own, and padding is not counted")
    precision = _precision(config.engine.precision, device)
    if precision == "bf16" and device.name == "v100":
        precision = "fp16"
        assumptions.append("fp16 in place of bf16, which a V100 does not have")
    return Workload(
        anatomy=anatomy, precision=precision, stage=config.engine.zero_stage,
        sequence_length=config.data.sequence_length, context=min(context, config.data.sequence_length),
        mask_rate=max(config.objective.mask_rate, config.objective.mask_rate_final or 0.0),
        global_batch=config.train.global_batch, micro_batch=min(config.train.micro_batch, config.train.global_batch),
        max_steps=config.train.max_steps, optimizer=config.optimizer.kind,
        compile=config.engine.compile, bucket_elements=config.engine.bucket_elements,
        longest_save_interval_s=60 * config.checkpoint.longest_minutes,
        device_hours_per_failure=config.checkpoint.gpu_hours_per_failure, assumptions=tuple(assumptions),
    )  # fmt: skip


def _precision(wanted: str, device: Device) -> Precision:
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if not device.is_gpu:
        return "fp32"
    return "fp16" if device.name == "v100" else "bf16"


def _read_shards(config: PretrainConfig) -> tuple[int, float] | None:
    """(vocabulary, mean context) of local shards that are there; None where they are not, or lie behind a URL."""
    path = config.data.path if config.data.path is not None else config.data.sources[0].path
    location = parse_location(path)
    if isinstance(location, RemoteUrl) or not (Path(location) / TRAIN).is_dir():
        return None
    try:
        tokenizer = load_tokenizer(config.data)
        dataset = open_split(path, TRAIN, tokenizer, config.data)
    except DstrainError as error:
        raise ConfigError(f"{error}\n(to plan without these shards, give --vocab-size and --mean-context)") from None
    return tokenizer.vocab_size, mean_context([dataset], config.data.sequence_length)


def _assumed_vocabulary(config: PretrainConfig, assumptions: list[str]) -> int:
    given = config.model.config.get("vocab_size")
    if isinstance(given, int):
        return given
    assumptions.append(f"a vocabulary of {ASSUMED_VOCABULARY:,}: there are no shards to read it from (--vocab-size)")
    return ASSUMED_VOCABULARY


def _assumed_context(config: PretrainConfig, assumptions: list[str]) -> float:
    length = config.data.sequence_length
    assumptions.append(f"documents that fill their rows of {length}, the most attention can cost (--mean-context)")
    return float(length)
