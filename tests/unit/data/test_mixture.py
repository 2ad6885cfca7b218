from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.data.mixture import MAX_PERIOD, Mixture, integer_shares

shares_ = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def sequence(mixture, lane, turns):
    source, before = mixture.split(np.full(turns, lane), np.arange(turns))
    return source.tolist(), before.tolist()


@settings(max_examples=200)
@given(shares_, st.integers(1, 12), st.integers(0, 2**40))
def test_counts_are_exact_over_every_period_and_never_far_off(shares, lanes, seed):
    period = sum(shares)
    mixture = Mixture(shares, lanes=lanes, seed=seed)
    lane = seed % lanes
    sources, before = sequence(mixture, lane, 2 * period)
    seen = Counter()
    for turn, (source, count) in enumerate(zip(sources, before)):
        assert count == seen[source]  # a source's own turns are counted without gap
        seen[source] += 1
        for other, share in enumerate(shares):
            assert abs(seen[other] - Fraction((turn + 1) * share, period)) < len(shares)
        if (turn + 1) % period == 0:
            assert [seen[s] for s in range(len(shares))] == [share * (turn + 1) // period for share in shares]


@settings(max_examples=50)
@given(shares_, st.integers(1, 8), st.integers(0, 500))
def test_counts_are_those_of_the_sequence(shares, lanes, turns):
    mixture = Mixture(shares, lanes=lanes, seed=1)
    found = mixture.counts(np.arange(lanes), turns)
    for lane in range(lanes):
        sources = sequence(mixture, lane, turns)[0]
        assert found[lane].tolist() == [sources.count(s) for s in range(len(shares))]


@settings(max_examples=50)
@given(shares_, st.integers(0, 10**9))
def test_a_turn_far_ahead_is_as_good_as_the_first(shares, turn):
    mixture = Mixture(shares, lanes=4, seed=0)
    [source], [before] = (part.tolist() for part in mixture.split(np.array([3]), np.array([turn])))
    assert mixture.counts(np.array([3]), turn)[0, source] == before
    assert mixture.counts(np.array([3]), turn + 1)[0, source] == before + 1


def test_every_batch_is_a_fair_sample_of_the_mixture():
    shares, lanes = (70, 20, 10), 64
    mixture = Mixture(shares, lanes=lanes, seed=5)
    counts = []
    for turn in range(200):
        sources = mixture.split(np.arange(lanes), np.full(lanes, turn))[0]
        counts.append(np.bincount(sources, minlength=3))
    expected = lanes * np.array(shares) / 100
    assert np.abs(np.array(counts)[:, 0] - expected[0]).max() <= 1
    independent = expected * (1 - np.array(shares) / 100)  # the variance of drawing each row by lot
    assert (np.var(counts, axis=0) < 0.7 * independent).all()


def test_a_source_without_weight_never_comes_and_a_tiny_one_does():
    shares = integer_shares({"a": 1.0, "b": 0.0, "c": 1e-6})
    assert shares == {"a": 1_000_000, "b": 0, "c": 1}
    mixture = Mixture(list(shares.values()), lanes=2, seed=0)
    counts = mixture.counts(np.arange(2), 10 * 1_000_001)
    assert counts.tolist() == [[10_000_000, 0, 10]] * 2


@given(st.dictionaries(st.sampled_from("abcdefg"), st.floats(0, 1e6), min_size=1))
def test_shares_keep_the_proportions(weights):
    total = sum(weights.values())
    if total == 0:
        with pytest.raises(ConfigError, match="add up to 0"):
            integer_shares(weights)
        return
    shares = integer_shares(weights)
    period = sum(shares.values())
    assert 0 < period <= MAX_PERIOD
    assert list(shares) == sorted(weights)
    for name, weight in weights.items():
        assert (shares[name] == 0) == (weight == 0)
        assert abs(shares[name] / period - weight / total) <= len(weights) / min(period, MAX_PERIOD) + 1e-9


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_refused_by_name(weight):
    with pytest.raises(ConfigError, match=r"data\.sources: the weight of source 'wiki' is"):
        integer_shares({"wiki": weight, "b": 1.0}, key="data.sources")
