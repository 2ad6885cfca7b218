"""The `data:` section of a pretraining run: sources, how rows are made and ordered, what happens when bytes are damaged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.data.segment_warmup import SegmentWarmupConfig
from dstrain.data.source_order import Tail
from dstrain.data.stores import StorageConfig

DamagePolicy = Literal["fail", "mask", "substitute"]


class SourceConfig(Config):
    """One of several sources of a mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Keys the source's order, so keep it when folders move; also the name in phases, logs and the ledger."""
    path: str
    """Folder or URL made by `dstrain shards build`, or indexed by `dstrain shards index`."""
    weight: float | None = Field(default=None, ge=0.0)
    """Share of the rows, in any unit. Give every source a weight, or every source epochs."""
    epochs: float | None = Field(default=None, ge=0.0)
    """How often the source is seen in proportion to the others: weight = epochs · rows."""
    max_epochs: float | None = Field(default=None, gt=0.0)
    """Refuse to start when the run would repeat the source more often than this."""


class DataPhaseConfig(Config):
    """Another mixture or batch from some step on; what is left out stays as it was."""

    from_step: int | None = Field(default=None, ge=1)
    """Optimizer steps done when the phase begins."""
    from_tokens: int | None = Field(default=None, ge=1)
    """The same in tokens, counted as rows of all steps times data.sequence_length; the phase begins with the first step by which
    as many are done."""
    weights: dict[str, float] | None = None
    """New weights, one for every source."""
    global_batch: int | None = Field(default=None, ge=1)
    """Rows of one step from here on; data.lanes must divide it."""

    @property
    def key(self) -> str:
        """Names the phase in messages."""
        return (
            f"data.phases from_step={self.from_step}"
            if self.from_step
            else f"data.phases from_tokens={self.from_tokens}"
        )

    @model_validator(mode="after")
    def _one_beginning(self) -> DataPhaseConfig:
        if (self.from_step is None) == (self.from_tokens is None):
            raise ValueError("give from_step or from_tokens, and not both")
        return self


class SkipRowsConfig(Config):
    """Rows that are never trained on again."""

    source: str = "train"
    """Name of the source; "train" when data.path names the only one."""
    from_step: int = Field(default=0, ge=0)
    """Optimizer steps done when this begins to hold; a running job may only add rows for steps to come."""
    rows: list[tuple[int, int]] = Field(min_length=1, max_length=1_000_000)
    """[block, row] pairs, as `dstrain replay` prints them."""


class DataConfig(Config):
    """Where the shards are and how their rows are made and ordered."""

    path: str | None = None
    """Folder or URL made by `dstrain shards build`, with train/, validation/ and tokenizer/ inside. Or give `sources`."""
    sources: list[SourceConfig] = Field(default_factory=list, max_length=256)
    """Several such folders, mixed by weight."""
    phases: list[DataPhaseConfig] = Field(default_factory=list, max_length=1024)
    """Changes of the mixture or the batch, by step or by tokens."""
    sequence_length: int = Field(default=128, ge=8, le=65536)
    """Tokens of a packed row, special tokens included. Can change without building the shards again."""
    segment_warmup: SegmentWarmupConfig | None = None
    """Shorter pieces of documents at first, in the same rows. Default: none."""
    lanes: int | None = Field(default=None, ge=1)
    """Canonical lanes C of the plan; must divide the global batch. Default: the largest divisor up to 64."""
    window_rows: int = Field(default=8192, ge=1)
    """Rows of one shuffle window of a lane; 8192 in 64 lanes reaches the quality of a full shuffle (docs/data-format.md)."""
    tail: Tail = "rotate"
    """An epoch's last R mod C rows: `rotate` leaves out other ones each epoch, `exact` trains on all in one short step."""
    skip_steps: list[tuple[int, int]] = Field(default_factory=list, max_length=4096)
    """Windows [first, one past the last] of steps whose data is stepped over and never used (a loss spike)."""
    skip_rows: list[SkipRowsConfig] = Field(default_factory=list)
    """Rows that are never trained on again."""
    damage: DamagePolicy = "fail"
    """A damaged block: `fail` stops all ranks at the same step; `mask` goes on without its rows; `substitute` takes other
    rows of the same source instead."""
    damage_allowance: float = Field(default=1e-4, ge=0.0, le=1.0)
    """Share of all blocks that may be damaged (at least one block) before all ranks stop."""
    prefetch_steps: int = Field(default=2, ge=0, le=64)
    """Steps made ahead by background threads; 0 makes each step when it is asked for. Never changes the order."""
    prefetch_bytes: int = Field(default=1 << 28, ge=1 << 20)
    """Steps made ahead hold at most this many bytes (one step is always allowed)."""
    threads: int = Field(default=1, ge=1, le=64)
    """Threads per rank that make steps; one is enough for several GPUs' needs when the shards are local."""
    storage: StorageConfig = StorageConfig()
    """How remote shards are read and cached on each node."""
    tokenising_workers: int = Field(default=0, ge=0, le=64)
    """Processes per rank that tokenise the text of indexed foreign tars ahead; 0 tokenises in the prefetching thread."""
    cache_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """Decoded blocks kept in memory per rank and source, in bytes."""

    @model_validator(mode="after")
    def _pairs(self) -> DataConfig:
        if (self.path is None) == (not self.sources):
            raise ValueError("give data.path for one source, or data.sources for several, and not both")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("data.sources: a name stands twice; every source needs a name of its own")
        given = [(source.weight is not None, source.epochs is not None) for source in self.sources]
        if len(set(given)) > 1 or any(weight == epochs for weight, epochs in given):
            raise ValueError("data.sources: give every source a weight, or every source epochs")
        known = set(names) or {"train"}
        for phase in self.phases:
            if phase.weights is not None and set(phase.weights) != known:
                raise ValueError(
                    f"{phase.key}: weights name {sorted(phase.weights)}, "
                    f"the sources are {sorted(known)}; give one weight for each"
                )
        for skip in self.skip_rows:
            if skip.source not in known:
                raise ValueError(f"data.skip_rows: there is no source {skip.source!r}; the sources are {sorted(known)}")
        return self
