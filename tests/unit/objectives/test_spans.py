from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.objectives.masking import Masking
from dstrain.objectives.masking_config import MaskingConfig
from dstrain.objectives.philox import philox4x32
from dstrain.objectives.spans import SCALE, length_tail, reach_thresholds
from tests.support.packed_pieces import pieces_of

laws = st.tuples(st.floats(0.01, 0.99), st.integers(1, 64))


def test_the_law_is_that_of_spanbert():
    # arXiv 1907.10529, section 3.1: geometric with p = 0.2, cut at 10, mean length 3.8.
    tail = length_tail(0.2, 10)
    chances = -np.diff([*tail, 0.0])
    expected = 0.2 * 0.8 ** np.arange(10)
    np.testing.assert_allclose(chances, expected / expected.sum(), rtol=1e-12)
    assert sum(tail) == pytest.approx(3.8, abs=0.01)


@given(laws)
def test_tails_begin_at_one_and_fall(law):
    tail = length_tail(*law)
    assert (len(tail), tail[0]) == (law[1], 1.0)
    assert all(a > b > 0 for a, b in pairwise(tail))


@given(laws, st.floats(0.001, 0.999))
def test_the_share_that_is_covered_is_the_one_that_was_asked_for(law, share):
    p, longest = law
    reach = reach_thresholds(share, p=p, longest=longest)
    free = np.prod([1 - threshold / SCALE for threshold in reach])
    assert 1 - free == pytest.approx(share, abs=1e-7)
    assert len(reach) == longest
    assert list(reach) == sorted(reach, reverse=True)
    assert 0 < reach[0] < SCALE


def test_spans_of_one_unit_are_single_tokens():
    assert reach_thresholds(0.3, p=0.2, longest=1) == (int(0.3 * SCALE),)


@pytest.mark.parametrize(("p", "longest"), [(0.2, 10), (0.5, 4), (0.05, 32)])
def test_lengths_of_spans_follow_the_law(p, longest):
    reach = np.array(reach_thresholds(0.3, p=p, longest=longest), dtype=np.int64)
    words = np.concatenate(philox4x32((np.arange(500_000), 0, 0, 0), 5)).astype(np.int64)
    lengths = (words[:, None] < reach[None, :]).sum(axis=1)
    found = np.bincount(lengths[lengths > 0], minlength=longest + 1)[1:]
    count = found.sum()
    assert abs(count - len(words) * reach[0] / SCALE) < 4 * np.sqrt(count)
    expected = -np.diff([*length_tail(p, longest), 0.0])
    assert np.abs(found - count * expected).max() < 4.5 * np.sqrt(count * expected.max())
    assert (found - count * expected)[-1] ** 2 < 25 * count * expected[-1]


def test_lone_spans_in_masks_have_the_lengths_of_the_law():
    # At a low rate spans hardly ever meet, so runs of chosen tokens are single spans.
    config = MaskingConfig(mask_rate=0.004, spans=True)
    apply = Masking(config, seed=2, stream="t", mask_id=4, special_ids=range(5), vocab_size=100)
    pieces = pieces_of([np.full(1_500_000, 9)])
    targets = apply(pieces).targets
    runs = np.diff(np.flatnonzero(np.diff(targets, prepend=-9, append=targets[-1] + 9) > 1))
    single = runs[runs <= 10]
    assert len(single) > 0.98 * len(runs)
    chances = -np.diff([*length_tail(0.2, 10), 0.0])
    found = np.bincount(single, minlength=11)[1:]
    # The share of meetings is about rate · mean length, 1.5 %; it may shift a count by that much beside chance.
    assert (
        np.abs(found - len(single) * chances) < 4 * np.sqrt(len(single) * chances) + 0.02 * len(single) * chances.max()
    ).all()
    assert runs.mean() == pytest.approx(3.8, abs=0.25)


def test_spans_end_with_their_document():
    # One document is chosen up to its last token; the next one's first tokens do not know.
    config = MaskingConfig(mask_rate=0.5, spans=True)
    apply = Masking(config, seed=3, stream="t", mask_id=4, special_ids=range(5), vocab_size=100)
    pieces = pieces_of([np.full(20, 9) for _ in range(20_000)], head=0, tail=0)
    chosen = np.zeros(len(pieces.tokens), dtype=bool)
    chosen[apply(pieces).targets] = True
    last, first = chosen[19:-1:20], chosen[20::20]
    agreement = np.mean(last == first)
    assert abs(agreement - 0.5) < 4 * np.sqrt(0.25 / len(first))
    inside = np.mean(chosen[9::20] == chosen[10::20])
    assert inside > 0.75  # while neighbours inside a document mostly agree
