from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dstrain.corpus.sampling import HashSample, text_places


def sample(texts: list[str], limit: int) -> list[str]:
    found = HashSample(limit)
    for text in texts:
        data = text.encode()
        found.add(data, text_places(data)[0])
    assert found.size_bytes == sum(len(t.encode()) for t in found.texts())
    assert len(found) == len(list(found.texts()))
    return list(found.texts())


def least(texts: list[str], limit: int) -> list[str]:
    """By definition: texts in the order of their places until the limit is reached."""
    taken: list[str] = []
    for text in sorted({*texts}, key=lambda t: text_places(t.encode())[0]):
        if sum(len(t.encode()) for t in taken) >= limit:
            break
        taken.append(text)
    return taken


@given(st.lists(st.text(min_size=1, max_size=20), max_size=60), st.integers(1, 400), st.randoms(use_true_random=False))
def test_a_sample_is_the_texts_of_least_places_in_any_order(texts, limit, shuffler: random.Random):
    clean = [t.encode("utf-8", "ignore").decode() or "x" for t in texts]
    shuffled = [*clean, *clean[:5]]
    shuffler.shuffle(shuffled)
    assert sample(shuffled, limit) == sample(clean, limit) == least(clean, limit)


@given(st.lists(st.text("abcdef", min_size=1), max_size=40), st.integers(1, 100), st.integers(0, 100))
def test_a_larger_sample_contains_every_smaller_one(texts, limit, more):
    assert sample(texts, limit + more)[: len(sample(texts, limit))] == sample(texts, limit)


def test_places_are_spread_evenly_and_independent():
    places = [text_places(f"document {k}".encode()) for k in range(4000)]
    low = [first < 1 << 63 for first, _ in places]
    held = [second < 1 << 63 for _, second in places]
    assert abs(sum(low) / 4000 - 0.5) < 0.04  # 5 sigma
    assert abs(sum(a and b for a, b in zip(low, held)) / 4000 - 0.25) < 0.035
