from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, Source, find_sources, parse_hub_name, read_documents
from dstrain.corpus.tables import parquet_group_rows, parquet_rows

TEXTS = ["first text", "zweiter Text: äöü ✓", 'third,\twith "quotes"']


def read(path: Path | str, **settings) -> list[tuple[str, str]]:
    documents = read_documents(find_sources([str(path)]), CorpusConfig(**settings))
    return [(document.id, document.text) for document in documents]


def texts(path: Path | str, **settings) -> list[str]:
    return [text for _, text in read(path, **settings)]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_parquet_reads_only_the_text(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1, 2, 3]}), path, row_group_size=2)
    assert texts(path, text_field="body") == TEXTS
    with pytest.raises(DataError, match=r"t\.parquet: no field 'text'; it has 'body', 'n'.*--text-field"):
        read(path)


def test_a_datasets_folder_streams_through_its_hf_name(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl([{"text": text} for text in TEXTS]))
    assert texts(f"hf:{folder}:train") == TEXTS
    with pytest.raises(DataError, match="no field 'body'; it has 'text'"):
        texts(f"hf:{folder}", text_field="body")
    with pytest.raises(DataError, match=r"load_dataset\(.*split='nosplit'\) failed"):
        texts(f"hf:{folder}:nosplit")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:imdb", ("imdb", None, "train")),
        ("hf:own/name:test", ("own/name", None, "test")),
        ("hf:own/name/config:train[:1%]", ("own/name", "config", "train[:1%]")),
    ],
)
def test_hub_names_split_into_dataset_configuration_and_split(name, expected):
    assert parse_hub_name(name) == expected


def test_row_groups_are_read_apart_with_the_row_numbers_of_the_file(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, "fourth", "fifth"]}), path, row_group_size=2)
    assert parquet_group_rows(path) == [2, 2, 1]
    seen: list[int] = []
    part = Source(str(path), 100, start=1, stop=3, first_row=2)
    found = list(parquet_rows(part, seen.append, ["text"]))
    assert found == [(3, {"text": TEXTS[2]}), (4, {"text": "fourth"}), (5, {"text": "fifth"})]
    assert sum(seen) == 100
