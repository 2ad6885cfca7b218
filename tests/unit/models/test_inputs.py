"""Flat micro-batches as forward arguments."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.device import sent
from dstrain.base.protocols import MicroBatch
from dstrain.models.inputs import (
    pad_segments,
    padded_inputs,
    padded_rows,
    plain_batch,
    position_offset,
    unpadded_inputs,
)
from tests.support.fake_gpu import GPU, fake_gpu
from tests.support.tiny_models import documents, packed, tiny_model

lengths_of_segments = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple)


@settings(max_examples=40)
@given(lengths=lengths_of_segments, data=st.data())
def test_padded_rows_point_at_the_same_tokens_as_the_flat_targets(
    lengths: tuple[int, ...], data: st.DataObject
) -> None:
    batch = packed(documents(lengths))
    chosen = data.draw(st.lists(st.sampled_from(range(sum(lengths))), min_size=1, unique=True).map(sorted))
    batch = MicroBatch(
        tokens=batch.tokens,
        positions=batch.positions,
        lengths=lengths,
        targets=torch.tensor(chosen),
        labels=batch.labels,
    )
    inputs, width = padded_inputs(batch, pad_id=1)
    assert inputs["input_ids"].shape == (len(lengths), max(lengths)) == (len(lengths), width)
    flat = inputs["input_ids"].reshape(-1)
    assert torch.equal(flat[padded_rows(batch, width)], batch.tokens[batch.targets])


@settings(max_examples=40)
@given(lengths=lengths_of_segments)
def test_padding_is_hidden_and_nothing_else(lengths: tuple[int, ...]) -> None:
    batch = packed(documents(lengths))
    inputs, _ = padded_inputs(batch, pad_id=1)
    assert inputs["attention_mask"].sum(1).tolist() == list(lengths)
    assert torch.equal(inputs["input_ids"][inputs["attention_mask"].bool()], batch.tokens)
    assert (inputs["input_ids"][~inputs["attention_mask"].bool()] == 1).all()


def test_pad_segments_fills_up_with_the_value() -> None:
    assert pad_segments(torch.tensor([1, 2, 3, 4]), (3, 1), -7).tolist() == [[1, 2, 3], [4, -7, -7]]


def test_positions_of_the_flat_row_start_where_the_family_counts_from() -> None:
    assert position_offset(tiny_model("bert").model) == 0
    assert position_offset(tiny_model("modernbert").model) == 0
    roberta = tiny_model("roberta").model
    assert position_offset(roberta) == 2, "after the padding index, 1 here"
    inputs = unpadded_inputs(roberta, packed(documents((3, 2))))
    assert inputs["position_ids"].tolist() == [[2, 3, 4, 2, 3]]


def test_token_types_are_passed_only_where_there_are_some() -> None:
    model = tiny_model("bert").model
    batch = packed(documents((3, 2)))
    assert "token_type_ids" not in unpadded_inputs(model, batch)
    types = torch.tensor([0, 1, 1, 0, 1])
    assert unpadded_inputs(model, batch, token_types=types)["token_type_ids"].tolist() == [[0, 1, 1, 0, 1]]


def test_a_plain_batch_scores_every_token_at_restarting_positions() -> None:
    batch = plain_batch(torch.tensor([7, 8, 9]), (2, 1))
    assert batch.positions.tolist() == [0, 1, 0]
    assert batch.targets.tolist() == [0, 1, 2]
    assert torch.equal(batch.labels, batch.tokens)


def test_no_input_is_made_in_a_way_that_a_gpu_makes_the_host_wait_for() -> None:
    with fake_gpu():
        batch = packed(documents((3, 2)))
        tokens, positions, targets = (sent(t, "cuda") for t in (batch.tokens, batch.positions, batch.targets))
        batch = dataclasses.replace(batch, tokens=tokens, positions=positions, targets=targets)
        inputs, width = padded_inputs(batch, pad_id=1)
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 3)
        assert padded_rows(batch, width).shape == targets.shape
        assert unpadded_inputs(tiny_model("bert").model, batch)["segments"].cu_seqlens.device == GPU
