from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.data.corpus import CorpusConfig, find_sources, parse_hub_name, read_documents

TEXTS = ["first text", "zweiter Text: äöü ✓", 'third,\twith "quotes"']


def read(path: Path | str, **settings) -> list[tuple[str, str]]:
    documents = read_documents(find_sources([str(path)]), CorpusConfig(**settings))
    return [(document.id, document.text) for document in documents]


def texts(path: Path | str, **settings) -> list[str]:
    return [text for _, text in read(path, **settings)]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_reads_plain_and_compressed_and_names_file_and_line(tmp_path, suffix):
    data = jsonl([{"text": text, "id": f"d{i}"} for i, text in enumerate(TEXTS)])
    packed = {"": data, ".gz": gzip.compress(data), ".zst": zstandard.compress(data)}[suffix]
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(packed)
    assert read(path) == [(f"{path}:{i + 1}", text) for i, text in enumerate(TEXTS)]
    assert read(path, id_field="id") == [(f"d{i}", text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_all_parts_of_a_concatenated_archive_are_read(tmp_path, compress):
    path = tmp_path / ("c.jsonl.gz" if compress is gzip.compress else "c.jsonl.zst")
    path.write_bytes(b"".join(compress(jsonl([{"text": text}])) for text in TEXTS))
    assert texts(path) == TEXTS


def test_txt_is_one_document_or_paragraphs_or_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffone\ntwo\r\n\n  \nthree\n".encode())
    assert read(path) == [(str(path), "one\ntwo\r\n\n  \nthree")]
    assert read(path, split="blank-lines") == [(f"{path}:1", "one\ntwo"), (f"{path}:5", "three")]
    assert texts(path, split="lines") == ["one", "two", "", "  ", "three"]


def test_csv_reads_quoted_fields_over_lines_and_tsv_takes_quotes_as_text(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('id,text\n7,"a ""quoted"", long\ntext"\n8,plain\n')
    assert read(table, id_field="id") == [("7", 'a "quoted", long\ntext'), ("8", "plain")]
    tabs = tmp_path / "t.tsv.gz"
    tabs.write_bytes(gzip.compress(b'body\tn\n"open quote\t1\nplain\t2\n'))
    assert texts(tabs, text_field="body") == ['"open quote', "plain"]


def test_csv_fields_may_be_longer_than_the_library_default(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(texts(path)[0]) == 300_000


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


def test_patterns_give_every_file_once_in_name_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    inputs = [str(tmp_path / "**/*.txt"), str(tmp_path / "b.txt")]
    sources = find_sources(inputs)
    assert [Path(source.name).name for source in sources] == ["a.txt", "b.txt", "c.txt"]
    assert sum(source.size_bytes or 0 for source in sources) == 19


def test_progress_reports_the_stored_bytes(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl([{"text": text} for text in TEXTS])))
    seen: list[int] = []
    list(read_documents(find_sources([str(path)]), CorpusConfig(), on_bytes=seen.append))
    assert sum(seen) == path.stat().st_size


def refused(path: Path, message: str, **settings) -> None:
    with pytest.raises(DataError, match=message):
        read(path, **settings)


def test_missing_inputs_are_named_with_a_near_name(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    refused(tmp_path / "corpsu.txt", r"no such input file\. Did you mean .*corpus\.txt")
    refused(tmp_path / "*.jsonl", "matches no file")
    refused(tmp_path, r"is a folder; say which files")
    with pytest.raises(DataError, match="no input given"):
        find_sources([])


def test_a_line_that_is_not_utf8_is_named_by_line_and_offset(tmp_path):
    path = tmp_path / "c.jsonl"
    good = jsonl([{"text": "fine"}])
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    refused(path, rf"c\.jsonl:2: not UTF-8: byte 0xe9 at offset {len(good) + 13} .*iconv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"c\.jsonl:2: not valid JSON"),
        (b"[1]", r"c\.jsonl:2: each line must be a JSON object, found list"),
        (b'{"body": "x", "n": 1}', r"c\.jsonl:2: no field 'text'; it has 'body', 'n'\. .*--text-field"),
        (b'{"text": null}', r"c\.jsonl:2: the field 'text' holds NoneType"),
        (b'{"text": "\\ud800"}', r"c\.jsonl:2: the text is not valid Unicode"),
        (b"[" * 100_000, r"c\.jsonl:2: not valid JSON"),
    ],
)
def test_bad_json_rows_are_named(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    refused(path, message)


def test_bad_table_rows_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,text\n1,fine\n2\n")
    refused(path, r"t\.csv:3: 1 fields, the header has 2")
    path.write_text('text\n"never closed\n')
    refused(path, r"t\.csv:2: cannot be read as CSV")
    path.write_text("id,body\n1,fine\n")
    refused(path, r"t\.csv:2: no field 'text'; it has 'id', 'body'")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_archive_is_refused(tmp_path, suffix):
    data = jsonl([{"text": f"{i} " + "".join(chr(97 + (i * k * k) % 26) for k in range(200))} for i in range(500)])
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    refused(path, r"cannot be read to its end|not valid JSON")


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "a.parquet").write_bytes(b"plain text")
    refused(tmp_path / "a.jsonl.gz", "cannot be read")
    refused(tmp_path / "a.parquet", "cannot be read")
    (tmp_path / "a.pdf").write_bytes(b"x")
    refused(tmp_path / "a.pdf", r"cannot tell the format by the name.*--format")
    assert texts(tmp_path / "a.pdf", format="txt") == ["x"]


def test_a_line_without_end_cannot_fill_the_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"a" * 50_000))
    refused(path, r"bomb\.jsonl\.gz:1: this line is longer than 1000 bytes", max_document_bytes=1000)
    book = tmp_path / "book.txt"
    book.write_text("word word\n" * 500)
    refused(book, "longer than 1000 bytes; cut the file with --split", max_document_bytes=1000)


@given(st.lists(st.text(), max_size=8))
def test_any_text_survives_jsonl(tmp_path_factory, found):
    clean = [text for text in found if text.encode("utf-8", "ignore").decode() == text]
    path = tmp_path_factory.mktemp("any") / "c.jsonl"
    path.write_bytes(jsonl([{"text": text} for text in clean]))
    assert texts(path) == clean
