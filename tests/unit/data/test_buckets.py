from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data import buckets
from dstrain.data.buckets import Buckets, num_buckets


def drained(folder, texts, *, seed=0, count=1):
    shuffled = Buckets(folder, seed=seed, count=count)
    for text in texts:
        shuffled.add(text)
    found = list(shuffled.drain())
    assert not folder.exists()
    return found


@given(st.lists(st.text(alphabet="abé✓", max_size=4), max_size=40), st.randoms(), st.integers(1, 9))
def test_order_depends_on_the_texts_alone(tmp_path_factory, texts, random, count):
    folder = tmp_path_factory.mktemp("b")
    moved = texts.copy()
    random.shuffle(moved)
    one = drained(folder / "a", texts)
    assert drained(folder / "b", moved, count=count) == one
    assert sorted(document.text for document in one) == sorted(texts)
    assert sorted({document.text for document in one if not document.is_duplicate}) == sorted(set(texts))
    assert sum(document.is_duplicate for document in one) == len(texts) - len(set(texts))


def test_a_seed_reorders_but_holds_out_the_same(tmp_path):
    texts = [f"text {k}" for k in range(200)]
    first, second = (drained(tmp_path / str(seed), texts, seed=seed) for seed in (1, 2))
    assert [d.text for d in first] != [d.text for d in second]
    assert {d.text: d.split_hash for d in first} == {d.text: d.split_hash for d in second}


def test_more_text_than_the_buffers_hold_spills_and_comes_back(tmp_path, monkeypatch):
    texts = [f"text {k} " * 20 for k in range(300)]
    expected = drained(tmp_path / "a", texts, count=4)
    monkeypatch.setattr(buckets, "_BUFFER_BYTES", 1000)
    assert drained(tmp_path / "b", texts, count=4) == expected


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (257 << 20, 2), (1 << 60, 4096), (None, 64)])
def test_the_number_of_buckets_follows_the_text(size, expected):
    assert num_buckets(size) == expected
