"""Cut segments hold the same tokens and targets, and no piece is longer than asked for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from pydantic import ValidationError

from dstrain.base.protocols import MicroBatch
from dstrain.data.segment_warmup import SegmentWarmupConfig, cut_segments, longest_at

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(lambda some: tuple(sorted(some, reverse=True)))


def batch_of(lengths: tuple[int, ...], every: int) -> MicroBatch:
    tokens = torch.arange(sum(lengths)) + 100  # each token is unlike all others
    targets = torch.arange(0, len(tokens), every)
    return MicroBatch(
        tokens=tokens, positions=torch.cat([torch.arange(n) for n in lengths]), lengths=lengths, targets=targets,
        labels=tokens[targets] * 7, token_types=tokens % 2, num_targets=len(targets), num_tokens=len(tokens),
    )  # fmt: skip


@given(LENGTHS, st.integers(1, 50), st.integers(1, 5))
def test_pieces_are_the_segments_cut_one_after_the_other(lengths: tuple[int, ...], longest: int, every: int) -> None:
    batch = batch_of(lengths, every)
    found = cut_segments(batch, longest)
    assert max(found.lengths) <= longest
    assert list(found.lengths) == sorted(found.lengths, reverse=True), "longest first, as layouts want them"
    assert sum(found.lengths) == sum(lengths)
    pieces = [part.tolist() for part in torch.split(found.tokens, list(found.lengths))]
    whole = torch.split(batch.tokens, list(lengths))
    assert sorted(pieces) == sorted(
        some[a : a + longest].tolist() for some in whole for a in range(0, len(some), longest)
    )
    assert torch.equal(found.positions, torch.cat([torch.arange(n) for n in found.lengths]))
    assert torch.equal(found.tokens[found.targets], batch.tokens[batch.targets]), "targets keep their order"
    assert torch.equal(found.labels, batch.labels)
    assert torch.equal(found.token_types, found.tokens % 2)
    assert (found.num_targets, found.num_tokens) == (batch.num_targets, batch.num_tokens)


def test_what_is_short_enough_is_left_as_it_is() -> None:
    batch = batch_of((9, 5), 2)
    assert cut_segments(batch, 9) is batch


def test_the_length_grows_in_jumps_of_eight_and_ends_at_the_rows() -> None:
    config = SegmentWarmupConfig(first_length=16, until_step=8, increments=4)
    found = [longest_at(config, progress=step / 8, sequence_length=100) for step in range(10)]
    assert found == [16, 16, 32, 32, 56, 56, 72, 72, 100, 100]


@given(st.integers(8, 300), st.integers(8, 300), st.integers(1, 64))
def test_the_length_never_falls(first: int, row: int, increments: int) -> None:
    config = SegmentWarmupConfig(first_length=first, until_step=100, increments=increments)
    found = [longest_at(config, progress=n / 100, sequence_length=row) for n in range(102)]
    assert found == sorted(found)
    assert found[0] == min(first, row)
    assert found[-1] == row


def test_one_end_is_given() -> None:
    for wrong in ({}, {"until_step": 5, "until_tokens": 5}):
        with pytest.raises(ValidationError, match="give until_step or until_tokens, and not both"):
            SegmentWarmupConfig(first_length=8, **wrong)
