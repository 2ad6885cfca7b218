"""How the rooms meet: small data types and Protocols, no logic.

Shapes: T tokens of a micro-batch (all its segments back to back), N segments (one document or one example each),
M targets. A micro-batch is always flat and unpadded; whoever needs padding (a model outside the attention interface)
makes it from `cu_seqlens`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

IGNORED_LABEL = -100
"""A target that counts for nothing (torch's cross-entropy convention)."""


@dataclass(frozen=True)
class Pieces:
    """The tokens of one micro-batch before corruption; all arrays (T,), segments back to back."""

    tokens: npt.NDArray[np.int64]
    """Ids, frame included."""
    frame: npt.NDArray[np.bool_]
    """True on the special tokens that frame a piece."""
    uid: npt.NDArray[np.int64]
    """Identity of the document: block number · 2^24 + document in block; never depends on packing."""
    position: npt.NDArray[np.int64]
    """Token's position in its document (0 on frames)."""
    word: npt.NDArray[np.int64] | None
    """Position in the document of the first token of this token's word, where the tokenizer tells."""
    epoch: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corrupted:
    """What the objective made of the pieces."""

    tokens: npt.NDArray[np.int64]
    """(T,) model input."""
    targets: npt.NDArray[np.int64]
    """(M,) indices to score, M may be 0."""
    labels: npt.NDArray[np.int64]
    """(M,) true ids there."""


Corrupt = Callable[[Pieces], Corrupted]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward sees. All tensors live on one device."""

    tokens: Tensor
    """(T,) int64: token ids of all segments, back to back, longest segment first."""
    positions: Tensor
    """(T,) int64: position inside its own segment, from 0."""
    lengths: tuple[int, ...]
    """N segment lengths, descending; their sum is T."""
    targets: Tensor
    """(M,) int64: for a token objective, indices into `tokens`; for a segment objective, indices of segments. M ≥ 1."""
    labels: Tensor
    """(M,) int64 classes or float32 values; IGNORED_LABEL where a target is only there to keep shapes legal."""
    token_types: Tensor | None = None
    """(T,) int64 segment types of sentence pairs, where the model has them."""
    num_targets: int = 0
    """Targets that count (labels that are not ignored)."""
    num_tokens: int = 0
    """Real tokens: T less the filler of an empty micro-batch."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        if str(device) == "cpu":
            return self
        move = {name: getattr(self, name) for name in ("tokens", "positions", "targets", "labels", "token_types")}
        moved = {k: v.pin_memory().to(device, non_blocking=True) if v is not None else None for k, v in move.items()}
        return MicroBatch(**moved, lengths=self.lengths, num_targets=self.num_targets, num_tokens=self.num_tokens)  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepData:
    """This rank's share of one optimizer step."""

    micro_batches: Sequence[MicroBatch]
    """The same number on every rank; a rank short of rows gets filler with zero weight."""
    num_rows: int
    """Rows (or examples) of this rank."""
    padded_tokens: int
    """Token slots of this rank's rows, used or not: rows · row length. Padding is 1 - tokens/slots."""
    ledger: int
    """Sum over this rank's rows of mix(row identity, masks, step) modulo 2^63: world-independent when added over ranks."""
    epoch: float
    """Epochs completed when this step is done."""


class Loader(Protocol):
    """A pure function of the step: asking twice gives the same bytes, asking out of order is allowed."""

    steps_per_epoch: float

    def step(self, step: int) -> StepData:
        """This rank's data of optimizer step `step` (from 0)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """A few JSON-able integers and fingerprints that pin the data order; no buffers."""
        ...

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse, with a diff, a state of another dataset, order or batch size."""
        ...


@dataclass(frozen=True)
class LossParts:
    """What an objective returns for one micro-batch; sums, so that ranks and micro-batches add up exactly."""

    loss_sum: Tensor
    """() float32: summed loss over targets that count; differentiable."""
    correct: Tensor
    """() float32: targets predicted right (0 for regression)."""


class Objective(Protocol):
    """Turns a model's logits at the targets into a summed loss."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Run `model(batch)`, whose result is (M, classes) logits at `batch.targets`, and score it."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; global values, the same on every rank."""

    step: int
    """The step just done, counted from 1."""
    loss: float
    """Mean loss per counted target, over all ranks and micro-batches."""
    accuracy: float
    """Share of counted targets predicted right."""
    gradient_norm: float
    """Global gradient norm before clipping; inf or nan when the step was skipped."""
    learning_rate: float
    applied: bool
    """False when the optimizer step was skipped because a gradient was not finite."""
    num_tokens: int
    """Real tokens, all ranks."""
    num_targets: int
    num_rows: int
    padded_tokens: int
    ledger: int
    epoch: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds of this rank by part: data, forward_backward, step, save, evaluate, other, total."""


@dataclass
class RunState:
    """The counters that survive a crash. JSON-able, small, the same on every rank."""

    step: int = 0
    """Optimizer steps done."""
    rows: int = 0
    """Rows (or examples) consumed globally."""
    tokens: int = 0
    """Real tokens consumed globally."""
    ledger: int = 0
    """Sum of the step ledgers modulo 2^63."""
    skipped_steps: int = 0
    compute_seconds: float = 0.0
    """Wall seconds spent in steps, over all restarts."""
    best_metric: float | None = None
    best_step: int | None = None


class Observer(Protocol):
    """Looks at the loop, never touches what it computes."""

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Called after every optimizer step on every rank."""
        ...

    def on_end(self, state: RunState) -> None:
        """Called once when the loop leaves, for whatever reason that is not a crash."""
        ...
