"""Dynamic masking as a pure function of (seed, stream, epoch, document, position): the NumPy definition.

A token's fate never depends on its row, rank, batch or the sequence length, so it survives a resume, another world size and
another packing. Special tokens are never masked; random replacements come from the full vocabulary less the specials.
The law, in words of Philox4x32-10 with a key of (seed, stream); D is the document and E the epoch:

    W(i)    word (i+64) mod 4 of Philox(⌊(i+64)/4⌋, D low, D high, E)
    V(i)    words of Philox((i+64) + 2^31, D low, D high, E)
    chosen  unit u (the token's position, or the number of its word) when W(u-k) < T[k] for a k < m (objectives.spans);
            without spans m = 1 and T[0] = rate · 2^32
    lot     W(u) out of T[0] when units are single tokens; else V(x)[0] out of 2^32, where x is the token's position, or, with
            replace = unit, the word's number or the unit u-k that began the nearest span. The first mask_share of the range
            shows [MASK], the next random_share a random token, the rest the true one.
    random  ordinary id number ⌊V(position)[1] · ordinary ids / 2^32⌋

`objectives.masking_torch` is the same law for tensors, bit for bit. Docs: docs/masking.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import Corrupted, Pieces
from dstrain.base.seeds import derive
from dstrain.objectives.mask_rate import rate_at
from dstrain.objectives.masking_config import MaskingConfig
from dstrain.objectives.philox import UInt32, philox4x32
from dstrain.objectives.spans import SCALE, reach_thresholds

MASKING_VERSION = 2
"""Part of every loader state: a change of the arithmetic below must raise it."""

BEFORE = 64
"""Units before a document's beginning whose spans may reach into it; added to an index, so that none is negative."""
SECOND = 1 << 31
"""Added to the first counter word for V."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Thresholds:
    """What the random words of one step are compared with; integers up to 2^32."""

    reach: tuple[int, ...]
    """(m,) T[k]."""
    mask: int
    """Lots below this show [MASK]."""
    random: int
    """Lots from `mask` to below this show a random token."""


@dataclass(frozen=True)
class _Choice:
    """Chosen tokens, ascending; all arrays (M,)."""

    targets: Int64
    segment: Int64
    """Whose token it is."""
    unit: Int64
    """The unit of its lot under `replace = unit`."""
    word: UInt32
    """W of the unit."""

    def only(self, kept: npt.NDArray[np.bool_]) -> _Choice:
        return _Choice(self.targets[kept], self.segment[kept], self.unit[kept], self.word[kept])


class Masking:
    """The corruption of one run and stream; call it with pieces. Holds only constants."""

    def __init__(
        self,
        config: MaskingConfig,
        *,
        seed: int,
        stream: str,
        mask_id: int,
        special_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        """Prepare the tables.

        Args:
            config: rates, shares and units.
            seed: the run's seed.
            stream: names the source or purpose ("train", "evaluation"), so that streams share no mask.
            mask_id: id of [MASK].
            special_ids: never masked, never drawn.
            vocab_size: ids are below this.

        Raises:
            ConfigError: no ordinary token is left to draw from.
        """
        self.config = config
        self.key = derive(seed, "mask", stream)
        self.mask_id = mask_id
        self.special = np.zeros(vocab_size, dtype=np.bool_)
        self.special[[i for i in special_ids if 0 <= i < vocab_size]] = True
        self.ordinary: Int64 = np.flatnonzero(~self.special)
        self._thresholds: tuple[float, Thresholds] | None = None
        if not len(self.ordinary):
            raise ConfigError(
                f"masking: all {vocab_size} ids of the vocabulary are special tokens; train a larger tokenizer"
            )

    @property
    def description(self) -> str:
        """What pins the masks besides the data: kept in the checkpoint and compared on resume."""
        c = self.config
        text = f"mlm.v{MASKING_VERSION} rate={c.mask_rate} mask={c.mask_share} random={c.random_share} whole_word={c.whole_word}"
        if c.mask_rate_final is not None:
            text += f" final_rate={c.mask_rate_final} steps={c.mask_rate_steps} shape={c.mask_rate_shape}"
        if c.spans:
            text += f" spans={c.span_p}/{c.span_longest}"
        if self.lots_of_units:
            text += " replace=unit"
        return text

    @property
    def single_tokens(self) -> bool:
        """Whether every unit is one token and no span joins them, so that W decides the lot as well."""
        return not (self.config.whole_word or self.config.spans)

    @property
    def lots_of_units(self) -> bool:
        """Whether a word or span has one lot."""
        return self.config.replace == "unit" and not self.single_tokens

    def rate(self, step: int) -> float:
        """Share of tokens to predict at an optimizer step."""
        c = self.config
        return rate_at(
            step, first=c.mask_rate, last=c.mask_rate_final, steps=c.mask_rate_steps, shape=c.mask_rate_shape
        )

    def thresholds(self, step: int) -> Thresholds:
        """What random words are compared with at an optimizer step."""
        rate, known, c = self.rate(step), self._thresholds, self.config
        if known is None or known[0] != rate:
            reach = reach_thresholds(rate, p=c.span_p, longest=c.span_longest) if c.spans else (int(rate * SCALE),)
            whole = reach[0] if self.single_tokens else SCALE
            mask, random = int(c.mask_share * whole), min(whole, int((c.mask_share + c.random_share) * whole))
            known = self._thresholds = (rate, Thresholds(reach=reach, mask=mask, random=random))
        return known[1]

    def __call__(self, pieces: Pieces, *, step: int = 0) -> Corrupted:
        """Corrupt the tokens of a micro-batch; `targets` ascend."""
        tokens = pieces.tokens.astype(np.int64)
        if not len(pieces.lengths):
            return Corrupted(tokens=tokens, targets=np.zeros(0, dtype=np.int64), labels=np.zeros(0, dtype=np.int64))
        thresholds = self.thresholds(step)
        choice = self._choose(pieces, thresholds.reach)
        labels = tokens.take(choice.targets)
        special = self.special.take(labels)
        if special.any():
            choice, labels = choice.only(~special), labels[~special]
        lot = self._lot(pieces, choice)
        tokens[choice.targets[lot < thresholds.mask]] = self.mask_id
        random = np.flatnonzero((lot >= thresholds.mask) & (lot < thresholds.random))
        position = self._position(pieces, choice.targets[random], choice.segment[random])
        draw = self._second(pieces, position, choice.segment[random])[1].astype(np.uint64)
        tokens[choice.targets[random]] = self.ordinary[(draw * np.uint64(len(self.ordinary))) >> np.uint64(32)]
        return Corrupted(tokens=tokens, targets=choice.targets, labels=labels)

    def _choose(self, pieces: Pieces, reach: tuple[int, ...]) -> _Choice:
        """Compare W for all units of all segments, four units to a call, and find the tokens of the chosen ones."""
        ends = np.cumsum(pieces.lengths)
        content = ends - pieces.lengths + pieces.head
        words = pieces.word_begins if self.config.whole_word else None
        first, count = pieces.starts, pieces.lengths - (pieces.head + pieces.tail)
        if words is not None and pieces.first_words is not None:
            first, count = pieces.first_words, np.add.reduceat(words, ends - pieces.lengths, dtype=np.int64)
        index = first + BEFORE
        begin = (index - (len(reach) - 1)) >> 2
        calls = ((index + count + 3) >> 2) - begin
        call = np.cumsum(calls) - calls
        owner = np.repeat(np.arange(len(calls)), calls)
        w = self._first(pieces, np.arange(len(owner)) + (begin - call).take(owner), owner)
        slot = index + 4 * (call - begin)  # where W of a segment's first unit stands in w
        chosen = _covered(w, reach)
        chosen &= _inside(len(w), slot, slot + count)
        at = np.flatnonzero(chosen)
        segment = owner.take(at >> 2)
        word = w.take(at)
        unit = at + (first - slot).take(segment)
        if self.lots_of_units and len(reach) > 1:
            unit -= _nearest(w, at, reach)
        if words is None:
            return _Choice(at + (content - slot).take(segment), segment, unit, word)
        number = at + (np.cumsum(count) - count - slot).take(segment)
        return _tokens_of_words(number, words, ends - pieces.tail, np.cumsum(count), _Choice(at, segment, unit, word))

    def _first(self, pieces: Pieces, counter: Int64, segment: Int64) -> UInt32:
        """(4 n,) all four words of each call, one after another."""
        document = pieces.documents.take(segment)
        found = philox4x32((counter, document, document >> 32, pieces.epochs.take(segment)), self.key)
        return np.stack(found, axis=1).ravel()

    def _second(self, pieces: Pieces, index: Int64, segment: Int64) -> tuple[UInt32, ...]:
        """V of some indices."""
        document = pieces.documents.take(segment)
        counter = index + (BEFORE + SECOND)
        return philox4x32((counter, document, document >> 32, pieces.epochs.take(segment)), self.key)

    def _lot(self, pieces: Pieces, choice: _Choice) -> UInt32:
        if self.single_tokens:
            return choice.word
        unit = choice.unit if self.lots_of_units else self._position(pieces, choice.targets, choice.segment)
        return self._second(pieces, unit, choice.segment)[0]

    @staticmethod
    def _position(pieces: Pieces, targets: Int64, segment: Int64) -> Int64:
        return pieces.offsets.take(targets) - pieces.head + pieces.starts.take(segment)


def _covered(w: UInt32, reach: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Whether a unit begins a span or one of the units before it began one that reaches it."""
    chosen = w < np.uint32(reach[0])
    for back, threshold in enumerate(reach[1:], start=1):
        chosen[back:] |= w[:-back] < np.uint32(threshold)
    return chosen


def _nearest(w: UInt32, at: Int64, reach: tuple[int, ...]) -> Int64:
    """How many units before a covered one its nearest span began."""
    back = np.zeros(len(at), dtype=np.int64)
    for k in range(len(reach) - 1, -1, -1):
        back[w.take(at - k) < np.uint32(reach[k])] = k
    return back


def _inside(size: int, begin: Int64, end: Int64) -> npt.NDArray[np.bool_]:
    """(size,) True in the ranges [begin, end), which are not empty and ascend without overlap."""
    edge = np.zeros(size + 1, dtype=np.int8)
    edge[begin] += 1
    edge[end] -= 1
    return edge[:-1].cumsum(dtype=np.int8).view(np.bool_)


def _tokens_of_words(
    number: Int64, begins: npt.NDArray[np.bool_], content_ends: Int64, last: Int64, words: _Choice
) -> _Choice:
    """From chosen words to their tokens.

    Args:
        number: (M,) of each chosen word in the micro-batch.
        begins: (T,) where words begin.
        content_ends: (N,) end of each segment's content.
        last: (N,) number of words up to each segment's end.
        words: the chosen words.
    """
    first = np.flatnonzero(begins)
    end = np.empty_like(first)
    end[:-1] = first[1:]
    end[last - 1] = content_ends
    first = first.take(number)
    size = end.take(number) - first
    word = np.repeat(np.arange(len(size)), size)
    before = np.cumsum(size) - size
    targets = np.arange(len(word)) + (first - before).take(word)
    return _Choice(targets, words.segment.take(word), words.unit.take(word), words.word.take(word))
