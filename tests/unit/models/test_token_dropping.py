"""Which tokens stay: right counts, in order, and a function of what stands in a segment, not of what it lies beside."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from dstrain.models.token_dropping import (
    TokenDroppingConfig,
    first_places,
    kept_lengths,
    kept_tokens,
    segment_keys,
    share_at,
)
from tests.support.tiny_models import documents

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(lambda some: sorted(some, reverse=True))


def kept(texts: list[Tensor], share: float, *, salt: int = 7) -> list[list[int]]:
    """Positions that stay, by segment."""
    lengths = [len(text) for text in texts]
    tokens, positions = torch.cat(texts), torch.cat([torch.arange(n) for n in lengths])
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    keys = segment_keys(tokens, positions, segments, len(lengths))
    places = first_places(lengths, kept_lengths(lengths, share), device=tokens.device)
    index = kept_tokens(keys, positions, segments, places=places, salt=salt)
    assert torch.equal(index, index.unique()), "ascending, each once"
    return [positions[index[segments[index] == n]].tolist() for n in range(len(lengths))]


def test_the_share_grows_in_equal_jumps_and_ends_at_all() -> None:
    config = TokenDroppingConfig(first_share=0.5, steps=8, increments=4)
    assert [share_at(config, step) for step in range(10)] == [
        0.5,
        0.5,
        0.625,
        0.625,
        0.75,
        0.75,
        0.875,
        0.875,
        1.0,
        1.0,
    ]


@given(first=st.floats(0.05, 1), steps=st.integers(1, 300), increments=st.integers(1, 64))
def test_the_share_never_falls(first: float, steps: int, increments: int) -> None:
    config = TokenDroppingConfig(first_share=first, steps=steps, increments=increments)
    shares = [share_at(config, step) for step in range(steps + 2)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(first)
    assert shares[-1] == 1.0
    assert len(set(shares)) <= increments + 1


@given(LENGTHS, st.floats(0.01, 1.0))
def test_every_segment_keeps_its_share_and_at_least_one_token(lengths: list[int], share: float) -> None:
    counts = kept_lengths(lengths, share)
    assert all(1 <= k <= n for k, n in zip(counts, lengths))
    assert all(abs(k - share * n) <= 1 for k, n in zip(counts, lengths))
    assert list(counts) == sorted(counts, reverse=True), "segments stay longest first"
    found = kept(documents(lengths), share)
    assert [len(some) for some in found] == list(counts)
    assert kept_lengths(lengths, 1.0) == tuple(lengths)


@given(LENGTHS, st.integers(0, 7))
def test_neighbours_do_not_matter(lengths: list[int], number: int) -> None:
    texts = documents(lengths)
    number %= len(texts)
    assert kept(texts, 0.5)[number] == kept([texts[number]], 0.5)[0]


def test_another_salt_and_another_text_keep_other_tokens() -> None:
    text, other = documents((40, 40))
    assert kept([text], 0.5, salt=1) != kept([text], 0.5, salt=2)
    assert kept([text], 0.5, salt=(1 << 64) - 1) != kept([text], 0.5, salt=1)
    assert kept([text], 0.5) != kept([other], 0.5)


def test_every_position_stays_equally_often() -> None:
    counts = torch.zeros(16)
    text = documents((16,))[0]
    for salt in range(2000):
        counts[kept([text], 0.5, salt=salt * 0x9E3779B97F4A7C15 % (1 << 64))[0]] += 1
    assert float((counts / 2000 - 0.5).abs().max()) < 0.05
