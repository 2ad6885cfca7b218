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
from torch import Tensor, nn

IGNORED_LABEL = -100
"""A target that counts for nothing (torch's cross-entropy convention)."""


@dataclass(frozen=True)
class Pieces:
    """The tokens of one micro-batch before corruption: T tokens in N segments back to back, longest first.

    A segment is one piece of a document inside its frame of special tokens. What is the same for a whole segment is kept
    once for it; the properties spell it out for each token.
    """

    tokens: npt.NDArray[Any]
    """(T,) ids, frames included; unsigned integers as stored."""
    offsets: npt.NDArray[np.int64]
    """(T,) position inside the segment, from 0, frame included."""
    lengths: npt.NDArray[np.int64]
    """(N,) tokens of each segment, frame included, descending."""
    documents: npt.NDArray[np.int64]
    """(N,) identity of the document: block number · 2^24 + document in block, XOR its source's salt; a 64-bit pattern."""
    starts: npt.NDArray[np.int64]
    """(N,) position in its document of the segment's first content token."""
    epochs: npt.NDArray[np.int64]
    """(N,) epoch of the source."""
    head: int
    """Special tokens before the content of each segment."""
    tail: int
    """Special tokens after it."""
    word_begins: npt.NDArray[np.bool_] | None = None
    """(T,) True where a word begins and at each segment's first content token, False on frames; None without words."""
    first_words: npt.NDArray[np.int64] | None = None
    """(N,) number, in its document, of the word that the segment's first content token belongs to."""

    @property
    def frame(self) -> npt.NDArray[np.bool_]:
        """(T,) True on the special tokens that frame a segment."""
        return (self.offsets < self.head) | (self.offsets >= np.repeat(self.lengths - self.tail, self.lengths))

    @property
    def uid(self) -> npt.NDArray[np.int64]:
        """(T,) identity of each token's document."""
        return np.repeat(self.documents, self.lengths)

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """(T,) each token's position in its document; 0 on frames."""
        return np.where(self.frame, 0, self.offsets - self.head + np.repeat(self.starts, self.lengths))

    @property
    def epoch(self) -> npt.NDArray[np.int64]:
        """(T,) epoch of each token."""
        return np.repeat(self.epochs, self.lengths)


@dataclass(frozen=True)
class Corrupted:
    """What the objective made of the pieces."""

    tokens: npt.NDArray[np.int64]
    """(T,) model input."""
    targets: npt.NDArray[np.int64]
    """(M,) indices to score, M may be 0."""
    labels: npt.NDArray[np.int64]
    """(M,) true ids there."""


class Corrupt(Protocol):
    """What the objective does to a micro-batch before the model sees it; a pure function of pieces and step."""

    def __call__(self, pieces: Pieces, *, step: int) -> Corrupted:
        """Corrupt the pieces; `step` counts optimizer steps from 0 and matters only where a rate follows a schedule."""
        ...


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
    damaged: tuple[tuple[str, int], ...] = ()
    """(source, block) of blocks this rank could not read and did without."""


class Loader(Protocol):
    """A pure function of the step: asking twice gives the same bytes, asking out of order is allowed."""

    steps_per_epoch: float

    def step(self, step: int) -> StepData:
        """This rank's data of optimizer step `step` (from 0)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """A few JSON-able integers and fingerprints that pin the data order; no buffers."""
        ...

    def restore(self, state: Mapping[str, Any], *, step: int, accept_new_data: bool = False) -> str | None:
        """Go on after `step` steps; refuse, with a diff, a state of other data, unless that is accepted and recorded.

        Returns:
            What differs when other data was accepted.
        """
        ...

    def num_micro_batches(self, step: int) -> int:
        """Forwards of a step, the same on every rank."""
        ...

    def close_blocks(self, blocks: Sequence[tuple[str, int]], *, from_step: int) -> Sequence[tuple[str, int, int]]:
        """Do without damaged blocks from a step on; the same call on every rank. Returns the newly closed ones."""
        ...

    def phase_of(self, step: int) -> int:
        """Number of the phase of the data that a step belongs to; steps of one phase have comparable losses."""
        ...

    def rows_of(self, step: int) -> Sequence[tuple[str, int, int]]:
        """(source, block, row) of everything that all ranks together train on in a step, for the record."""
        ...

    def skip_window(self, first: int, last: int, *, from_step: int) -> None:
        """Step over the data that steps [first, last) would have taken: it is never trained on again.

        The same call on every rank, with no step at or after `first` being made at the same time. Part of the state.

        Args:
            first: at or after `from_step`.
            last: one past the last step.
            from_step: optimizer steps done by the state that the run goes on from.

        Raises:
            ValueError: no window, or one that would change the data of steps already done.
        """
        ...


@dataclass(frozen=True)
class LossParts:
    """What an objective returns for one micro-batch; sums, so that ranks and micro-batches add up exactly."""

    loss_sum: Tensor
    """() float32: summed loss over targets that count; differentiable."""
    correct: Tensor
    """() float32: targets predicted right (0 for regression)."""


class HeadLoss(Protocol):
    """Scores hidden states where a model would make logits of them, so that the logits need not exist at once."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(M, H) states, (V, H) matrix, (V,) bias: () float32 summed loss, differentiable, and () float32 hits."""
        ...


class Objective(Protocol):
    """Turns a model's logits at the targets into a summed loss."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Run `model(batch)`, whose result is (M, classes) logits at `batch.targets`, and score it.

        A model whose `scores_at_head` is true takes `head_loss=` (a `HeadLoss`) and returns what that returns.
        """
        ...


@dataclass(frozen=True)
class StepFlags:
    """What a rank asks of the run before a step; all ranks learn in that step's agreement what any of them asked."""

    stop: bool = False
    """Save at the next boundary and leave."""
    hurry: bool = False
    """Little time is left: nothing at the boundary but what saving needs."""
    save_wanted: bool = False
    """A save is due at the next boundary (rank 0's schedule, or a person asked)."""
    save_failed: bool = False
    """The save in flight failed on this rank: all ranks settle it at the next boundary."""


class Interrupted(Exception):  # noqa: N818  (not a fault: the answer to a stop request)
    """Collective. A long phase was left early because of a stop request; raised on all ranks at the same point.

    Also raised on one rank by whatever waits for data and will not wait any more; the ranks then agree on it.
    """


ShouldLeave = Callable[[], bool]
"""Whether this rank was asked to stop; asked by everything that may wait for long, from any thread."""


def never() -> bool:
    """A `ShouldLeave` for work that nobody asks to stop."""
    return False


class Progress(Protocol):
    """Told by the loop what it is about to do, so that a watchdog knows how long that may take."""

    def enter(self, phase: str, step: int) -> None:
        """A phase begins.

        Args:
            phase: one of `PHASES`.
            step: optimizer steps done.
        """
        ...


PHASES = ("data", "step", "evaluate", "save")
"""What the loop does: wait for data, take a step, evaluate, save."""


class Unwatched:
    """A `Progress` that nobody looks at."""

    def enter(self, phase: str, step: int) -> None:
        """Nothing."""


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
    forward_s: float = 0.0
    """Seconds of this rank in forwards, a part of forward_backward that waits for no other rank."""


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
    evaluation_due: bool = False
    """The evaluation at this step was left out for a stop request; the run that goes on makes up for it."""


class Observer(Protocol):
    """Looks at the loop, never touches what it computes."""

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Called after every optimizer step on every rank."""
        ...

    def on_end(self, state: RunState) -> None:
        """Called once when the loop leaves, for whatever reason that is not a crash."""
        ...
