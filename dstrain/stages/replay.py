"""One step of a run as text: which documents it trained on, and what was hidden, shuffled or kept in them.

A pure look at the data: no model, no engine, no GPU, nothing written. The rows come from the plan, the masks from the run's own
corruption, so what is shown is what was trained on, which the step's ledger proves where the run wrote it down.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import Corrupted, Pieces
from dstrain.base.world import World
from dstrain.data.ledger import LEDGER_MODULUS, ledger_digest
from dstrain.data.packing import pack
from dstrain.data.plan import rank_slots
from dstrain.data.rows import RowSource
from dstrain.data.source_order import EMPTY
from dstrain.data.tokenizer import Tokenizer
from dstrain.stages.audit import restore_loader
from dstrain.stages.config import PretrainConfig
from dstrain.stages.record import read_record
from dstrain.stages.training_data import TRAIN, TrainingData, open_training_data, training_masking

Kind = Literal["plain", "mask", "random", "kept"]


@dataclass(frozen=True)
class Span:
    """Text of one fate."""

    kind: Kind
    text: str
    """What stands in the document."""
    shown: str
    """What the model sees there."""
    space_before: bool


@dataclass(frozen=True)
class ReplayedDocument:
    """A document, or the part of one, in a row."""

    source: str
    epoch: int
    block: int
    row: int
    slot: int
    document: int
    """Number of the document in its block."""
    start: int
    """Its first token's position in the document."""
    tokens: int
    """Without frame."""
    scored: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ReplayedStep:
    """What one rank, or all of them, trained on in a step."""

    step: int
    """Counted from 1, as in events.jsonl and TensorBoard."""
    rank: int
    world: int
    rows: int
    empty_slots: int
    """Slots that train nothing: skipped rows, closed blocks, an exact epoch's tail."""
    num_documents: int
    counts: dict[str, int]
    """Tokens: real (frames included), content, scored, mask, random, kept."""
    ledger: int
    """Of these rows."""
    written: int | None
    """The step's ledger as the run wrote it; None where it did not, or where one rank's share is shown."""
    documents: tuple[ReplayedDocument, ...]
    """The first of them, in slot order."""


def replay_step(
    config: PretrainConfig, *, step: int, rank: int = 0, world: int = 1, max_documents: int = 8
) -> ReplayedStep:
    """Show a step.

    Args:
        config: of the run, as its folder says.
        step: counted from 1.
        rank: whose share; with world=1 it is the whole global batch.
        world: ranks the batch is shared among; the run's own number is not needed.
        max_documents: documents to render; counts and ledger always cover all.

    Raises:
        ConfigError: there is no such step or rank, or the run has left no trace of the step.
        DstrainError: the data cannot be rebuilt as the checkpoint pins it.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"--rank: {rank} is not one of the {world} ranks of --world; ranks count from 0")
    record = read_record(config.run_folder)
    if step > record.last_step:
        raise ConfigError(
            f"--step: {config.run_folder} has trained {record.last_step} steps as far as its events and checkpoints say; "
            f"nothing was trained on in step {step} yet"
        )
    data = open_training_data(config, World())
    restore_loader(data.loader, record)
    if step <= data.loader.origin:
        raise ConfigError(
            f"--step: step {step} was trained on data that the run has left behind; "
            f"its present data begins with step {data.loader.origin + 1}"
        )
    first, last = rank_slots(data.loader.plan.global_batch(step - 1), rank=rank, world_size=world)
    written = next((p.of_step for p in record.points if p.step == step and p.of_step is not None), None)
    replayed = _Replay(config, data, step=step - 1, max_documents=max_documents)
    replayed.add_slots(first, last)
    return ReplayedStep(
        step=step, rank=rank, world=world, rows=replayed.rows, empty_slots=last - first - replayed.rows,
        num_documents=replayed.num_documents, counts=replayed.counts, ledger=replayed.ledger,
        written=written if world == 1 else None, documents=tuple(replayed.documents),
    )  # fmt: skip


class _Replay:
    """Goes through the rows of a step one by one: masks do not depend on the batch a row stands in."""

    def __init__(self, config: PretrainConfig, data: TrainingData, *, step: int, max_documents: int) -> None:
        self._data, self._step, self._max = data, step, max_documents
        self._corrupt = training_masking(config, data.tokenizer, stream=TRAIN)
        self._word_starts = data.tokenizer.word_starts()
        self.rows = self.num_documents = self.ledger = 0
        self.counts = dict.fromkeys(("real", "content", "scored", "mask", "random", "kept"), 0)
        self.documents: list[ReplayedDocument] = []

    def add_slots(self, first: int, last: int) -> None:
        planned = self._data.loader.planned(self._step, self._step + 1)
        columns = (planned.slot, planned.source, planned.epoch, planned.block, planned.row)
        for slot, source, epoch, block, row in zip(*(column[first:last].tolist() for column in columns)):
            if block != EMPTY:
                self._add_row(slot, source, epoch, block, row)

    def _add_row(self, slot: int, source: int, epoch: int, block: int, row: int) -> None:
        rows = self._data.loader.sources[source]
        pieces, lengths = rows.pieces([(epoch, block, row)])
        corrupted = self._corrupt(pieces, step=self._step)
        self.rows += 1
        self.ledger = (self.ledger + ledger_digest(pieces, corrupted, step=self._step)) % LEDGER_MODULUS
        self._count(pieces, corrupted, len(lengths) * rows.frame_length)
        numbers = documents_of_row(rows, block, row)
        self.num_documents += len(numbers)
        end = 0
        for number, length, start in zip(numbers, lengths, pieces.starts.tolist()):
            begin, end = end + pieces.head, end + length - pieces.tail
            if len(self.documents) < self._max:
                content = slice(begin, end)
                spans = tuple(self._spans(pieces.tokens[content], corrupted, begin))
                scored = int(((corrupted.targets >= begin) & (corrupted.targets < end)).sum())
                self.documents.append(
                    ReplayedDocument(
                        source=self._data.loader.names[source],
                        epoch=epoch,
                        block=block,
                        row=row,
                        slot=slot,
                        document=number,
                        start=start,
                        tokens=end - begin,
                        scored=scored,
                        spans=spans,
                    )
                )
            end += pieces.tail

    def _count(self, pieces: Pieces, corrupted: Corrupted, frames: int) -> None:
        shown = corrupted.tokens[corrupted.targets]
        hidden = shown == self._data.tokenizer.mask_id
        kept = ~hidden & (shown == corrupted.labels)
        found = (len(pieces.tokens), len(pieces.tokens) - frames, len(shown), int(hidden.sum()))
        for name, count in zip(self.counts, (*found, int((~hidden & ~kept).sum()), int(kept.sum()))):
            self.counts[name] += count

    def _spans(self, truth: npt.NDArray[Any], corrupted: Corrupted, begin: int) -> Iterator[Span]:
        scored = np.zeros(len(truth), dtype=np.bool_)
        inside = corrupted.targets[(corrupted.targets >= begin) & (corrupted.targets < begin + len(truth))] - begin
        scored[inside] = True
        shown = corrupted.tokens[begin : begin + len(truth)]
        return spans(truth, shown, scored, tokenizer=self._data.tokenizer, word_starts=self._word_starts)


def documents_of_row(source: RowSource, block: int, row: int) -> list[int]:
    """Numbers, in their block, of the documents of a row, longest piece first as the loader lays them out."""
    packing = pack(source.dataset.ends(block), sequence_length=source.sequence_length, frame_length=source.frame_length)
    first, last = packing.row_starts[row : row + 2].tolist()
    order = np.argsort(-packing.length[first:last], kind="stable")
    return [int(number) for number in packing.document[first:last][order]]


def spans(
    truth: npt.NDArray[Any], shown: npt.NDArray[Any], scored: npt.NDArray[np.bool_], *,
    tokenizer: Tokenizer, word_starts: npt.NDArray[np.bool_],
) -> Iterator[Span]:  # fmt: skip
    """A document as runs of plain text and single scored tokens.

    Args:
        truth: (T,) ids of the document.
        shown: (T,) ids that the model sees.
        scored: (T,) True where a prediction is asked for.
        tokenizer: turns ids to text.
        word_starts: (vocab,) True where a token begins a word.
    """
    at = 0
    while at < len(truth):
        end = at + 1
        while not scored[at] and end < len(truth) and not scored[end]:
            end += 1
        text = _text(tokenizer, truth[at:end])
        seen = text if not scored[at] else _text(tokenizer, shown[at:end])
        kind: Kind = "plain"
        if scored[at]:
            hidden, same = int(shown[at]) == tokenizer.mask_id, int(shown[at]) == int(truth[at])
            kind = "mask" if hidden else "kept" if same else "random"
        yield Span(kind, text, seen, space_before=at > 0 and bool(word_starts[truth[at]]))
        at = end


def _text(tokenizer: Tokenizer, ids: npt.NDArray[Any]) -> str:
    """Readable text of some ids; control characters, which could steer a terminal, become spaces."""
    text = tokenizer.decode(ids.tolist()).strip().removeprefix("##")
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)


MARKS: dict[Kind, Callable[[Span], str]] = {
    "plain": lambda span: span.text,
    "mask": lambda span: f"[MASK:{span.text}]",
    "random": lambda span: f"{{{span.shown}→{span.text}}}",
    "kept": lambda span: f"={span.text}=",
}
"""How each fate is written without colours."""


def marked_text(document: ReplayedDocument, paint: Callable[[Kind, str], str] | None = None) -> str:
    """A document in one line, with every scored token marked; `paint` may colour each mark."""
    parts = []
    for span in document.spans:
        mark = MARKS[span.kind](span)
        parts.append((" " if span.space_before else "") + (mark if paint is None else paint(span.kind, mark)))
    return "".join(parts)
