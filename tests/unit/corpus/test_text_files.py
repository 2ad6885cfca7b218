from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, Source, find_sources, read_documents
from dstrain.corpus.text_files import open_stream, read_text_rows, read_txt

TEXTS = ["first text", "zweiter Text: äöü ✓", 'third,\twith "quotes"']


def read(path: Path | str, **settings) -> list[tuple[str, str]]:
    documents = read_documents(find_sources([str(path)]), CorpusConfig(**settings))
    return [(document.id, document.text) for document in documents]


def texts(path: Path | str, **settings) -> list[str]:
    return [text for _, text in read(path, **settings)]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def refused(path: Path, message: str, **settings) -> None:
    with pytest.raises(DataError, match=message):
        read(path, **settings)


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


def test_a_line_that_is_not_utf8_is_named_by_line_and_offset(tmp_path):
    path = tmp_path / "c.jsonl"
    good = jsonl([{"text": "fine"}])
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    refused(path, rf"c\.jsonl:2: not UTF-8: byte 0xe9 at offset {len(good) + 13} .*iconv")


def test_utf16_is_named_as_what_it_is(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("fine\n".encode("utf-16"))
    refused(path, r"c\.txt:1: not UTF-8: .*iconv -f UTF-16 -t UTF-8")


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


def test_a_range_is_read_with_the_line_numbers_of_the_file(tmp_path):
    path = tmp_path / "c.jsonl"
    lines = [jsonl([{"text": text}]) for text in TEXTS]
    path.write_bytes(b"".join(lines))
    seen: list[int] = []
    part = Source(str(path), None, start=len(lines[0]), stop=len(lines[0] + lines[1]), first_row=1)
    assert list(read_text_rows(part, "jsonl", CorpusConfig(), seen.append)) == [(2, {"text": TEXTS[1]})]
    assert sum(seen) == len(lines[1])


def test_a_stream_is_closed_with_its_file(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("a\nb\n")
    documents = read_txt(Source(str(path), None), CorpusConfig(split="lines"), lambda _count: None)
    assert next(documents).text == "a"
    documents.close()
    with open_stream(Source(str(path), None), lambda _count: None) as stream:
        assert stream.read() == b"a\nb\n"
