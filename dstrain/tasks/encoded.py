"""Examples as token ids in flat arrays, and micro-batches made of them. Pure; knows no files, order or ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dstrain.base.protocols import IGNORED_LABEL, MicroBatch
from dstrain.data.rows import segment_positions
from dstrain.data.tokenizer import Tokenizer
from dstrain.tasks.examples import Examples

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedExamples:
    """N examples with their special tokens, T tokens in all."""

    tokens: npt.NDArray[np.int32]
    """(T,) ids, examples back to back."""
    token_types: npt.NDArray[np.int32]
    """(T,) 0 for the first text of an example, 1 for the second where the tokenizer tells them apart."""
    ends: Int64
    """(N,) where each example ends in `tokens`."""
    labels: npt.NDArray[Any]
    """(N,) int64 classes or float32 numbers; all IGNORED_LABEL when the examples have none."""
    has_labels: bool = True
    """Whether the labels are real, so that there is something to learn from or to score."""

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def lengths(self) -> Int64:
        """(N,) tokens of each example."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every id, type, boundary and label."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.token_types, self.ends, self.labels):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{little.dtype.str}{little.shape}".encode())
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()


def encode(examples: Examples, tokenizer: Tokenizer, *, max_length: int) -> EncodedExamples:
    """Tokenise examples, cut to `max_length` tokens, special tokens included.

    Raises:
        DataError: `max_length` leaves no room for text.
    """
    encoded = tokenizer.encode_examples(examples.texts, examples.pairs, max_length=max_length)
    return EncodedExamples(
        tokens=np.concatenate([e.tokens for e in encoded]).astype(np.int32),
        token_types=np.concatenate([e.token_types for e in encoded]).astype(np.int32),
        ends=np.cumsum([len(e.tokens) for e in encoded], dtype=np.int64),
        labels=examples.labels,
        has_labels=examples.has_labels,
    )


def longest_first(examples: EncodedExamples, indices: Int64) -> Int64:
    """The same indices, longest example first; equal lengths keep their order."""
    order = np.argsort(-examples.lengths[indices], kind="stable")
    return indices[order]


def make_micro_batch(examples: EncodedExamples, indices: Sequence[int] | Int64) -> MicroBatch:
    """Put some examples, longest first, into one micro-batch; none gives filler: right shapes, no weight.

    Args:
        examples: where they are taken from; at least one.
        indices: which ones, lengths descending. Targets are the segments themselves, in the same order.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if len(chosen) == 0:
        return _filler(examples)
    lengths = examples.lengths[chosen]
    where = np.repeat(examples.ends[chosen] - lengths, lengths) + segment_positions(lengths.tolist())
    labels = examples.labels[chosen]
    return MicroBatch(
        tokens=torch.from_numpy(examples.tokens[where].astype(np.int64)),
        positions=torch.from_numpy(segment_positions(lengths.tolist())),
        lengths=tuple(lengths.tolist()),
        targets=torch.arange(len(chosen)),
        labels=torch.from_numpy(labels),
        token_types=torch.from_numpy(examples.token_types[where].astype(np.int64)),
        num_targets=len(chosen) if examples.has_labels else 0,
        num_tokens=len(where),
    )


def _filler(examples: EncodedExamples) -> MicroBatch:
    shortest = int(examples.lengths.argmin())
    real = make_micro_batch(examples, [shortest])
    return MicroBatch(
        tokens=real.tokens,
        positions=real.positions,
        lengths=real.lengths,
        targets=real.targets,
        labels=torch.full_like(real.labels, IGNORED_LABEL),
        token_types=real.token_types,
        num_targets=0,
        num_tokens=0,
    )
