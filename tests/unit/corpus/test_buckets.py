from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus import buckets
from dstrain.corpus.buckets import BucketWriter, num_buckets, read_bucket


def shuffled(folder, parts, *, seed=0, count=1):
    files = []
    for number, texts in enumerate(parts):
        writer = BucketWriter(folder / f"part-{number}", seed=seed, count=count)
        for text in texts:
            writer.add(text.encode())
        files.append(writer.finish())
        assert writer.num_documents == len(texts)
    return [document for bucket in range(count) for document in read_bucket(files, bucket, count=count)]


@given(st.lists(st.text(alphabet="abé✓", max_size=4), max_size=40), st.randoms(), st.integers(1, 9), st.integers(1, 4))
def test_order_depends_on_the_texts_alone(tmp_path_factory, texts, random, count, parts):
    one, two = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    moved = texts.copy()
    random.shuffle(moved)
    found = shuffled(one, [texts])
    assert shuffled(two, [moved[k::parts] for k in range(parts)], count=count) == found
    assert sorted(document.text for document in found) == sorted(set(texts))
    assert {document.text: document.copies for document in found} == {text: texts.count(text) for text in texts}


def test_a_seed_reorders_but_holds_out_the_same(tmp_path):
    texts = [f"text {k}" for k in range(200)]
    found = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        found.append(shuffled(tmp_path / str(seed), [texts], seed=seed))
    first, second = found
    assert [d.text for d in first] != [d.text for d in second]
    assert {d.text: d.split_hash for d in first} == {d.text: d.split_hash for d in second}


def test_more_text_than_the_buffers_hold_spills_and_comes_back(tmp_path, monkeypatch):
    texts = [f"text {k} " * 20 for k in range(300)]
    for name in "ab":
        (tmp_path / name).mkdir()
    expected = shuffled(tmp_path / "a", [texts], count=4)
    monkeypatch.setattr(buckets, "_BUFFER_BYTES", 1000)
    assert shuffled(tmp_path / "b", [texts[:150], texts[150:]], count=4) == expected


def test_bounds_of_the_split_hash_are_those_of_the_documents(tmp_path):
    writer = BucketWriter(tmp_path / "p", seed=0, count=4)
    assert (writer.least_split, writer.greatest_split) == (None, None)
    for k in range(50):
        writer.add(str(k).encode())
    part = writer.finish()
    hashes = [document.split_hash for bucket in range(4) for document in read_bucket([part], bucket, count=4)]
    assert (writer.least_split, writer.greatest_split) == (min(hashes), max(hashes))


def test_a_part_that_was_cut_or_is_gone_is_refused(tmp_path):
    writer = BucketWriter(tmp_path / "p", seed=0, count=1)
    writer.add(b"text")
    part = writer.finish()
    os.truncate(tmp_path / "p", part.size_bytes - 1)
    with pytest.raises(DataError, match=r"should be .*delete it and build again"):
        list(read_bucket([part], 0, count=1))
    (tmp_path / "p").unlink()
    with pytest.raises(DataError, match="No such file"):
        list(read_bucket([part], 0, count=1))


@pytest.mark.parametrize(("size", "expected"), [(0, 64), (1, 64), (65 * 32 << 20, 128), (1 << 60, 8192), (None, 512)])
def test_the_number_of_buckets_follows_the_text(size, expected):
    assert num_buckets(size) == expected
