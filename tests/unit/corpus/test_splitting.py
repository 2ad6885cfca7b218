from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from dstrain.corpus.sources import Source
from dstrain.corpus.splitting import split_source
from tests.support.token_files import write_datatrove, write_mds, write_megatron

LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")), max_size=40)
QUICK = settings(max_examples=60, deadline=None)


def split_sources(sources: list[Source], config: CorpusConfig, *, target_bytes: int) -> list[Source]:
    return [part for source in sources for part in split_source(source, config, target_bytes=target_bytes)]


def check(path: Path, config: CorpusConfig, target_bytes: int) -> int:
    """The parts give the whole, also after a trip between processes, and their sizes sum up. Returns their number."""
    whole = find_sources([str(path)])
    parts = pickle.loads(pickle.dumps(split_sources(whole, config, target_bytes=target_bytes)))
    seen: list[int] = []
    expected = list(read_documents(whole, config))
    assert list(read_documents(parts, config, on_bytes=seen.append)) == expected
    assert sum(part.size_bytes or 0 for part in parts) == path.stat().st_size
    assert sum(seen) <= path.stat().st_size
    alone = [document for part in reversed(parts) for document in read_documents([part], config)]
    assert sorted(d.id for d in alone) == sorted(d.id for d in expected)
    return len(parts)


@QUICK
@given(
    lines=LINES, target=st.integers(1, 200), split=st.sampled_from(["file", "lines", "blank-lines"]), bom=st.booleans()
)
def test_parts_of_a_txt_file_give_the_whole(tmp_path_factory, lines, target, split, bom):
    path = tmp_path_factory.mktemp("txt") / "c.txt"
    path.write_text("\ufeff" * bom + "\n".join(lines), encoding="utf-8", newline="")
    check(path, CorpusConfig(split=split), target)


@QUICK
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))), target=st.integers(1, 200), end=st.booleans())
def test_parts_of_a_jsonl_file_give_the_whole(tmp_path_factory, texts, target, end):
    path = tmp_path_factory.mktemp("jsonl") / "c.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n" * end, encoding="utf-8")
    check(path, CorpusConfig(), target)


@QUICK
@given(groups=st.lists(st.integers(1, 5), min_size=1, max_size=8), target=st.integers(1, 4000))
def test_parts_of_a_parquet_file_give_the_whole(tmp_path_factory, groups, target):
    path = tmp_path_factory.mktemp("parquet") / "c.parquet"
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for number, size in enumerate(groups):
            writer.write_table(pyarrow.table({"text": [f"text {number} {k}" for k in range(size)]}, schema=schema))
    check(path, CorpusConfig(), target)


@QUICK
@given(
    lengths=st.lists(st.integers(0, 9), max_size=12),
    target=st.integers(1, 60),
    kind=st.sampled_from(["megatron", "ds"]),
)
def test_parts_of_files_of_ids_give_the_whole(tmp_path_factory, tokenizer_folder, lengths, target, kind):
    folder = tmp_path_factory.mktemp("ids")
    documents = [[20 + (7 * d + k) % 200 for k in range(length)] for d, length in enumerate(lengths)]
    if kind == "ds":
        path = write_datatrove(folder / "c.ds", documents)
    else:
        path = write_megatron(folder / "c", [[ids] for ids in documents])
    check(path, CorpusConfig(input_tokenizer=str(tokenizer_folder)), target)


@QUICK
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=12), target=st.integers(1, 400))
def test_parts_of_an_mds_shard_give_the_whole(tmp_path_factory, texts, target):
    folder = write_mds(tmp_path_factory.mktemp("mds"), {"text": ("str", None)}, [[{"text": t.encode()} for t in texts]])
    check(folder / "shard.00000.mds", CorpusConfig(), target)


def test_a_large_file_is_cut_near_the_target_and_ids_count_from_the_file(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 80}) + "\n" for _ in range(1000)))
    (source,) = find_sources([str(path)])
    parts = split_source(source, CorpusConfig(), target_bytes=10_000)
    assert len(parts) == 10
    assert all(part.size_bytes <= 10_000 + 93 for part in parts)
    first = next(iter(read_documents([parts[1]], CorpusConfig())))
    assert first.id == f"{path}:{parts[1].first_row + 1}"


def test_a_fault_in_a_part_names_the_line_of_the_file(tmp_path):
    path = tmp_path / "c.jsonl"
    lines = [json.dumps({"text": f"{k}"}).encode() for k in range(50)]
    lines[40] = b'{"text": "caf\xe9"}'
    path.write_bytes(b"\n".join(lines))
    offset = len(b"\n".join(lines[:40])) + 1 + 13
    parts = split_sources(find_sources([str(path)]), CorpusConfig(), target_bytes=100)
    assert len(parts) > 3
    with pytest.raises(DataError, match=rf"c\.jsonl:41: not UTF-8: byte 0xe9 at offset {offset} "):
        list(read_documents(parts, CorpusConfig()))


def test_what_cannot_be_cut_cheaply_stays_whole(tmp_path):
    data = b"".join(b'{"text": "a"}\n' for _ in range(1000))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(data, compresslevel=0))
    (tmp_path / "c.csv").write_text("text\n" + "a\n" * 1000)
    for name in ("c.jsonl.gz", "c.csv"):
        (source,) = find_sources([str(tmp_path / name)])
        assert split_source(source, CorpusConfig(), target_bytes=50) == [source]
    (hub,) = find_sources(["hf:some/name"])
    assert split_source(hub, CorpusConfig(), target_bytes=50) == [hub]


def test_a_line_that_no_reader_would_take_is_refused_at_the_cut(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"a" * 5000)
    with pytest.raises(DataError, match=r"c\.jsonl: a line at byte 10 is longer than 1000 bytes"):
        split_sources(find_sources([str(path)]), CorpusConfig(max_document_bytes=1000), target_bytes=10)


def test_a_damaged_index_is_named_when_parts_are_made(tmp_path):
    path = tmp_path / "c.parquet"
    path.write_bytes(b"plain text" * 10)
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read"):
        split_sources(find_sources([str(path)]), CorpusConfig(), target_bytes=10)
