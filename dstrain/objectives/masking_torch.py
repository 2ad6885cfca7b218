"""The law of `objectives.masking` for tensors on any device: the same masks, bit for bit, without waiting for the host.

For input pipelines that send ids as they are stored (2 bytes a token and 40 bytes a segment, instead of 24 bytes a token) and
mask on the GPU. Results are dense, (T,) inputs and (T,) labels, because a list of targets would need its length on the host.
Every token asks Philox for itself (four times the words it needs, one call more for each unit of span length): arithmetic that a
GPU has to spare. `torch.compile` takes it whole. The loader of `dstrain pretrain` masks on the CPU, ahead of the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dstrain.base.device import sent
from dstrain.base.protocols import IGNORED_LABEL, Pieces
from dstrain.objectives.masking import BEFORE, SECOND, Masking
from dstrain.objectives.philox_torch import philox4x32


@dataclass(frozen=True)
class PieceTensors:
    """`Pieces` as tensors of one device."""

    tokens: Tensor
    """(T,) ids, any integer type."""
    lengths: Tensor
    """(N,) int64, as are the others of this shape."""
    documents: Tensor
    starts: Tensor
    epochs: Tensor
    first_words: Tensor | None
    word_begins: Tensor | None
    """(T,) bool."""
    head: int
    tail: int

    @classmethod
    def of(cls, pieces: Pieces, device: torch.device | str) -> PieceTensors:
        """Copy pieces to a device."""

        def move(array: npt.NDArray[np.generic]) -> Tensor:
            return sent(torch.from_numpy(np.ascontiguousarray(array)), device)

        return cls(
            tokens=move(pieces.tokens),
            lengths=move(pieces.lengths),
            documents=move(pieces.documents),
            starts=move(pieces.starts),
            epochs=move(pieces.epochs),
            first_words=None if pieces.first_words is None else move(pieces.first_words),
            word_begins=None if pieces.word_begins is None else move(pieces.word_begins),
            head=pieces.head,
            tail=pieces.tail,
        )


class TorchMasking:
    """`Masking` for tensors. Holds only constants, on one device."""

    def __init__(self, masking: Masking, device: torch.device | str) -> None:
        """Copy the tables of a masking to a device."""
        self._masking = masking
        self._device = torch.device(device)
        self._special = sent(torch.from_numpy(masking.special), device)
        self._ordinary = sent(torch.from_numpy(masking.ordinary), device)

    def limits(self, step: int) -> Tensor:
        """(m + 2,) thresholds of an optimizer step: reach, mask, random. A tensor, so that a new rate compiles nothing anew."""
        found = self._masking.thresholds(step)
        return sent(torch.tensor([*found.reach, found.mask, found.random], dtype=torch.int64), self._device)

    def __call__(self, pieces: PieceTensors, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Corrupt a micro-batch.

        Args:
            pieces: on this masking's device.
            limits: of the step.

        Returns:
            (T,) int64 model input, and (T,) int64 true ids where they are to be predicted, IGNORED_LABEL elsewhere.
        """
        masking = self._masking
        tokens = pieces.tokens.to(torch.int64)
        size = tokens.shape[0]

        def spread(values: Tensor) -> Tensor:
            return torch.repeat_interleave(values, pieces.lengths, output_size=size)

        ends = torch.cumsum(pieces.lengths, dim=0)
        begins = ends - pieces.lengths
        place = torch.arange(size, device=tokens.device)
        offset = place - spread(begins) - pieces.head
        frame = (offset < 0) | (place >= spread(ends - pieces.tail))
        position = offset + spread(pieces.starts)
        unit = position
        if masking.config.whole_word and pieces.word_begins is not None and pieces.first_words is not None:
            number = torch.cumsum(pieces.word_begins, dim=0)
            before = number[begins] - pieces.word_begins[begins].to(torch.int64)
            unit = number - 1 + spread(pieces.first_words - before)
        document, epoch = spread(pieces.documents), spread(pieces.epochs)
        chosen, lot, draw = self._random(position, unit, document, epoch, limits)
        chosen = chosen & ~frame & ~self._special[tokens]
        drawn = self._ordinary[
            (draw * self._ordinary.shape[0]) >> 32
        ]  # below 2^63: a vocabulary has fewer than 2^31 ids
        mask, random = limits[-2], limits[-1]
        shown = torch.where(lot < mask, masking.mask_id, torch.where(lot < random, drawn, tokens))
        return torch.where(chosen, shown, tokens), torch.where(chosen, tokens, IGNORED_LABEL)

    def _random(
        self, position: Tensor, unit: Tensor, document: Tensor, epoch: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each token's unit is chosen, and each token's lot and draw."""
        masking, high = self._masking, document >> 32
        first = self._word(unit, document, epoch)
        chosen, nearest = first < limits[0], unit
        for back in range(1, limits.shape[0] - 2):
            reached = (self._word(unit - back, document, epoch) < limits[back]) & ~chosen
            nearest = torch.where(reached, unit - back, nearest)
            chosen = chosen | reached
        second = philox4x32((position + (BEFORE + SECOND), document, high, epoch), masking.key)
        if masking.single_tokens:
            lot = first
        elif masking.lots_of_units:
            lot = philox4x32((nearest + (BEFORE + SECOND), document, high, epoch), masking.key)[0]
        else:
            lot = second[0]
        return chosen, lot, second[1]

    def _word(self, unit: Tensor, document: Tensor, epoch: Tensor) -> Tensor:
        """W of some units."""
        index = (unit + BEFORE).clamp(min=0)  # frames have no unit; what they get is thrown away
        w0, w1, w2, w3 = philox4x32((index >> 2, document, document >> 32, epoch), self._masking.key)
        lane = index & 3
        return torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))
