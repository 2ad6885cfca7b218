"""The embedded corpora are what docs/corpora.md and NOTICE.md say they are."""

from __future__ import annotations

import collections
import csv
import gzip
import hashlib
import importlib.resources
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CORPORA = importlib.resources.files("dstrain") / "corpora"


def _read(name: str) -> bytes:
    return gzip.decompress((CORPORA / name).read_bytes())


def _movie_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(_read("movie_reviews.tsv.gz").decode("utf-8").splitlines(), delimiter="\t"))


@pytest.mark.parametrize("name", ["austen.jsonl", "movie_reviews.tsv"])
def test_the_uncompressed_bytes_have_the_documented_hash(name: str) -> None:
    page = (ROOT / "docs/corpora.md").read_text(encoding="utf-8")
    documented = re.search(rf"^([0-9a-f]{{64}})  {re.escape(name)}$", page, re.MULTILINE)
    assert documented is not None
    assert hashlib.sha256(_read(f"{name}.gz")).hexdigest() == documented[1]


@pytest.mark.parametrize("name", ["austen.jsonl.gz", "movie_reviews.tsv.gz"])
def test_the_gzip_header_holds_no_time(name: str) -> None:
    header = (CORPORA / name).read_bytes()[:10]
    assert header[:2] == b"\x1f\x8b"
    assert header[4:8] == bytes(4)


def test_austen_is_270_chapters_of_six_novels() -> None:
    documents = [json.loads(line) for line in _read("austen.jsonl.gz").decode("utf-8").splitlines()]
    assert len(documents) == 270
    assert len({document["id"] for document in documents}) == 270
    assert len({document["id"].rpartition("-")[0] for document in documents}) == 6
    assert all(document["text"].strip() for document in documents)


def test_movie_labels_follow_the_rating_and_near_zero_ratings_are_left_out() -> None:
    rows = _movie_rows()
    assert all(abs(float(row["rating"])) >= 0.5 for row in rows)
    assert all((row["label"] == "positive") == (float(row["rating"]) > 0) for row in rows)
    assert collections.Counter(row["label"] for row in rows) == {"positive": 4995, "negative": 5075}


def test_movie_sentences_are_distinct_and_read_the_same_with_and_without_quoting() -> None:
    rows = _movie_rows()
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == len(rows) == 10_070
    plain = [line.split("\t") for line in _read("movie_reviews.tsv.gz").decode("utf-8").splitlines()[1:]]
    assert [list(row.values()) for row in rows] == plain


def test_the_notice_holds_the_whole_mit_licence_and_the_citation() -> None:
    notice = (CORPORA / "NOTICE.md").read_text(encoding="utf-8")
    for phrase in (
        "Copyright (c) 2016 C.J. Hutto",
        "shall be included in all\ncopies",
        'PROVIDED "AS IS"',
        "public domain",
        "Hutto, C.J. & Gilbert, E.E. (2014)",
    ):
        assert phrase in notice
