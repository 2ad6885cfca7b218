"""Short segments first: in the first part of a run documents are cut into shorter pieces, in the same packed rows.

A warm-up of the sequence length steadies large rates and saves attention (arXiv 2108.06084, in its reshaping form: nothing is
thrown away, a long sequence becomes several short ones). Rows, masks, targets and ledger are those of a run without it; only
where attention ends and where positions begin again differs. A pure function of the step.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.base.protocols import MicroBatch

_MULTIPLE = 8  # lengths that matrix kernels like (arXiv 2108.06084, section 4)


class SegmentWarmupConfig(Config):
    """How long pieces of documents are at first; without this section, as long as rows allow from the beginning."""

    first_length: int = Field(ge=8)
    """Tokens of the longest piece in the first step."""
    until_step: int | None = Field(default=None, ge=1)
    """Optimizer steps until pieces are as long as rows allow."""
    until_tokens: int | None = Field(default=None, ge=1)
    """The same in tokens: rows of all steps times data.sequence_length."""
    increments: int = Field(default=16, ge=1, le=1024)
    """Equal jumps on the way."""

    @model_validator(mode="after")
    def _one_end(self) -> SegmentWarmupConfig:
        if (self.until_step is None) == (self.until_tokens is None):
            raise ValueError("give until_step or until_tokens, and not both")
        return self


def longest_at(config: SegmentWarmupConfig, *, progress: float, sequence_length: int) -> int:
    """Tokens of the longest piece.

    Args:
        config: the section.
        progress: share of the warm-up that is done; from 1 on nothing is cut.
        sequence_length: tokens of a row.
    """
    if progress >= 1.0 or config.first_length >= sequence_length:
        return sequence_length
    jumps = int(progress * config.increments)
    length = config.first_length + (sequence_length - config.first_length) * jumps // config.increments
    return max(config.first_length, length // _MULTIPLE * _MULTIPLE)


def cut_segments(batch: MicroBatch, longest: int) -> MicroBatch:
    """The same tokens and targets with no segment above a length; pieces longest first, positions from 0 in each.

    Args:
        batch: on the CPU, of a token objective.
        longest: tokens of a piece; the last piece of a segment has what is left.
    """
    lengths = np.array(batch.lengths, dtype=np.int64)
    if lengths.max() <= longest:
        return batch
    counts = -(-lengths // longest)
    pieces = np.full(int(counts.sum()), longest, dtype=np.int64)
    last = np.cumsum(counts) - 1
    pieces[last] = lengths - (counts - 1) * longest
    order = np.argsort(-pieces, kind="stable")
    begins = np.cumsum(pieces) - pieces
    sizes = pieces[order]
    inside = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = np.repeat(begins[order], sizes) + inside  # where each token was
    place = np.empty_like(source)
    place[source] = np.arange(len(source))
    index = torch.from_numpy(source)
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[index],
        positions=torch.from_numpy(inside),
        lengths=tuple(sizes.tolist()),
        targets=torch.from_numpy(place)[batch.targets],
        token_types=None if batch.token_types is None else batch.token_types[index],
    )
