from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, Source, find_sources, read_documents
from dstrain.corpus.sources import Document, file_format, row_document

TEXTS = ["first text", "zweiter Text: äöü ✓", 'third,\twith "quotes"']


def read(path: Path | str, **settings) -> list[tuple[str, str]]:
    documents = read_documents(find_sources([str(path)]), CorpusConfig(**settings))
    return [(document.id, document.text) for document in documents]


def texts(path: Path | str, **settings) -> list[str]:
    return [text for _, text in read(path, **settings)]


def refused(path: Path, message: str, **settings) -> None:
    with pytest.raises(DataError, match=message):
        read(path, **settings)


def test_patterns_give_every_file_once_in_name_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    inputs = [str(tmp_path / "**/*.txt"), str(tmp_path / "b.txt")]
    sources = find_sources(inputs)
    assert [Path(source.name).name for source in sources] == ["a.txt", "b.txt", "c.txt"]
    assert sum(source.size_bytes or 0 for source in sources) == 19


def test_missing_inputs_are_named_with_a_near_name(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    refused(tmp_path / "corpsu.txt", r"no such input file\. Did you mean .*corpus\.txt")
    refused(tmp_path / "*.jsonl", "matches no file")
    refused(tmp_path, r"is a folder; say which files")
    with pytest.raises(DataError, match="no input given"):
        find_sources([])


def test_formats_go_by_the_name_without_its_compression():
    names = {
        "a.jsonl.gz": "jsonl",
        "a.TXT.zst": "txt",
        "a.tsv": "tsv",
        "a.bin": "megatron",
        "a.idx": "megatron",
        "shard.00000.mds.zstd": "mds",
        "00000_tokens.ds": "datatrove",
        "a.b.parquet": "parquet",
    }
    assert {name: file_format(Path(name), CorpusConfig()) for name in names} == names
    assert file_format(Path("a.jsonl"), CorpusConfig(format="txt")) == "txt"
    for name in ("a", "a.gz", ".gz", "a.pdf"):
        with pytest.raises(DataError, match=f"{name}: cannot tell the format by the name"):
            file_format(Path(name), CorpusConfig())


def test_a_row_is_a_document_named_by_its_field_or_place():
    row = {"text": "t", "n": 7}
    assert row_document(row, CorpusConfig(), place="p:1") == Document("p:1", "t")
    assert row_document(row, CorpusConfig(id_field="n"), place="p:1") == Document("7", "t")
    with pytest.raises(DataError, match=r"p:1: no field 'key'.*--id-field"):
        row_document(row, CorpusConfig(id_field="key"), place="p:1")


def test_a_part_is_known_as_such():
    assert not Source("a.jsonl", 5).is_part
    assert Source("a.jsonl", 5, start=0, stop=5).is_part
    assert not Source("hf:a/b", None).is_file
