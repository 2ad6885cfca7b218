"""Segment attention against one dense attention with a block mask, which is slow and plainly right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dstrain.models.attention import SegmentLayout, segment_attention, segment_layout

HEADS, WIDTH = 2, 4
CPU = torch.device("cpu")

lengths_of_segments = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(tuple)
windows = st.one_of(st.none(), st.integers(0, 13))


def layout_of(lengths: tuple[int, ...]) -> SegmentLayout:
    return segment_layout(lengths, device=CPU)


def random_qkv(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, sum(lengths), WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def dense(qkv: list[Tensor], lengths: tuple[int, ...], *, scale: float, window: int | None) -> Tensor:
    """Softmax over everything, with -inf wherever two tokens are in different segments or too far apart."""
    query, key, value = qkv
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(segment))
    allowed = segment[:, None] == segment[None, :]
    if window is not None:
        allowed &= (index[:, None] - index[None, :]).abs() <= window
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=60)
@given(lengths=lengths_of_segments, window=windows, scale=st.sampled_from([0.5, 0.2, 1.7]))
def test_segments_equal_a_dense_attention_with_a_block_mask(
    lengths: tuple[int, ...], window: int | None, scale: float
) -> None:
    qkv = random_qkv(lengths)
    found = segment_attention(*qkv, layout_of(lengths), scale=scale, dropout=0.0, window=window)
    torch.testing.assert_close(found, dense(qkv, lengths, scale=scale, window=window), rtol=0, atol=1e-10)


@settings(max_examples=25)
@given(lengths=lengths_of_segments, window=windows)
def test_gradients_equal_those_of_the_dense_attention(lengths: tuple[int, ...], window: int | None) -> None:
    ours, theirs = random_qkv(lengths), random_qkv(lengths)
    weight = torch.linspace(-1, 1, sum(lengths) * HEADS * WIDTH, dtype=torch.float64).view(1, -1, HEADS, WIDTH)
    (segment_attention(*ours, layout_of(lengths), scale=0.5, dropout=0.0, window=window) * weight).sum().backward()
    (dense(theirs, lengths, scale=0.5, window=window) * weight).sum().backward()
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-10)


@settings(max_examples=30)
@given(lengths=lengths_of_segments.filter(lambda lengths: len(lengths) > 1), data=st.data())
def test_no_segment_sees_another(lengths: tuple[int, ...], data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, len(lengths) - 1))
    begin, end = sum(lengths[:changed]), sum(lengths[: changed + 1])
    qkv = [x.detach() for x in random_qkv(lengths)]
    before = segment_attention(*qkv, layout_of(lengths), scale=0.5, dropout=0.0, window=None)
    for x in qkv:
        x[:, :, begin:end] += 100.0
    after = segment_attention(*qkv, layout_of(lengths), scale=0.5, dropout=0.0, window=None)
    same = [i for i in range(sum(lengths)) if not begin <= i < end]
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, begin:end], after[:, begin:end])


def test_a_token_sees_exactly_the_neighbours_within_its_window() -> None:
    """Values are one-hot, so the output shows which tokens were looked at."""
    length, window = 8, 2
    query = torch.zeros(1, 1, length, length)
    value = torch.eye(length).view(1, 1, length, length)
    seen = segment_attention(query, query, value, layout_of((length,)), scale=1.0, dropout=0.0, window=window)[0, :, 0]
    for i in range(length):
        assert seen[i].nonzero().flatten().tolist() == [j for j in range(length) if abs(i - j) <= window]


def test_dropout_removes_attention_weights_and_keeps_their_mean() -> None:
    ones = torch.ones(1, 1, 400, 400)
    value = torch.eye(400).view(1, 1, 400, 400)
    torch.manual_seed(0)
    out = segment_attention(0 * ones, ones, value, layout_of((400,)), scale=1.0, dropout=0.25, window=None)
    dropped = float((out == 0).float().mean())
    assert 0.23 < dropped < 0.27
    assert float(out.sum(-1).mean()) == pytest.approx(1.0, abs=0.02)


def test_equal_neighbours_are_one_group() -> None:
    layout = layout_of((5, 5, 5, 3, 5))
    assert layout.groups == ((5, 3), (3, 1), (5, 1))
    assert layout.cu_seqlens.tolist() == [0, 5, 10, 15, 18, 23]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_length == 5
