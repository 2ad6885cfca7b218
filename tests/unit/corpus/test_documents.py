from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import zstandard

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, Source, corpus_identity, find_sources, read_documents, source_sha256
from tests.support.token_files import write_datatrove

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


def test_progress_reports_the_stored_bytes(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl([{"text": text} for text in TEXTS])))
    seen: list[int] = []
    list(read_documents(find_sources([str(path)]), CorpusConfig(), on_bytes=seen.append))
    assert sum(seen) == path.stat().st_size


def refused(path: Path, message: str, **settings) -> None:
    with pytest.raises(DataError, match=message):
        read(path, **settings)


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


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "a.parquet").write_bytes(b"plain text")
    refused(tmp_path / "a.jsonl.gz", "cannot be read")
    refused(tmp_path / "a.parquet", "cannot be read")
    (tmp_path / "a.pdf").write_bytes(b"x")
    refused(tmp_path / "a.pdf", r"cannot tell the format by the name.*--format")
    assert texts(tmp_path / "a.pdf", format="txt") == ["x"]


def test_a_files_digest_covers_the_index_that_cuts_it_into_documents(tmp_path):
    path = write_datatrove(tmp_path / "c.ds", [[1, 2], [3]])
    (source,) = find_sources([str(path)])
    before = source_sha256(source)
    write_datatrove(path, [[1], [2, 3]])
    assert source_sha256(source) != before
    plain = tmp_path / "c.txt"
    plain.write_text("a")
    assert source_sha256(Source(str(plain), 1)) == hashlib.sha256(b"a").hexdigest()


def test_an_input_tokenizer_counts_by_content_not_by_place(tmp_path, tokenizer_folder):
    copied = shutil.copytree(tokenizer_folder, tmp_path / "tok")
    one, two = (corpus_identity(CorpusConfig(input_tokenizer=str(f))) for f in (tokenizer_folder, copied))
    assert one == two
    assert str(tmp_path) not in json.dumps(two)
    with pytest.raises(DataError, match="--input-tokenizer takes a folder"):
        corpus_identity(CorpusConfig(input_tokenizer=str(tmp_path)))
