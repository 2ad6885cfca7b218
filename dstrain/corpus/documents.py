"""Read corpora as a stream of documents: the one place that knows which reader a source needs.

txt, jsonl, csv, tsv (all also .gz, .zst), parquet, Megatron .bin/.idx, MDS, datatrove .ds, WebDataset .tar, and `hf:`
datasets. Input streams in bounded memory. Every fault is a `DataError` that names file, line (or row) and mend: bytes that are not
UTF-8, a row without the text field, an index that does not fit its data, a pattern that matches nothing. No remote code
is run, no archive is extracted, nothing is unpickled. Does not tokenise, filter or shuffle.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard

from dstrain.base.errors import DataError
from dstrain.base.storage import file_sha256
from dstrain.corpus.datatrove import read_datatrove
from dstrain.corpus.foreign_source import read_webdataset
from dstrain.corpus.mds import read_mds
from dstrain.corpus.megatron import read_megatron
from dstrain.corpus.sources import (
    CorpusConfig,
    Document,
    Format,
    OnBytes,
    Source,
    file_format,
    find_sources,
    row_document,
)
from dstrain.corpus.tables import PARQUET_FAULTS, parquet_rows, parse_hub_name, read_hub
from dstrain.corpus.text_files import read_text_rows, read_txt

__all__ = [
    "CorpusConfig",
    "Document",
    "Format",
    "OnBytes",
    "Source",
    "corpus_identity",
    "faults_named",
    "file_format",
    "find_sources",
    "parse_hub_name",
    "read_documents",
    "read_rows",
    "source_sha256",
]

_WHOLE_READERS = {
    "txt": read_txt,
    "megatron": read_megatron,
    "mds": read_mds,
    "datatrove": read_datatrove,
    "webdataset": read_webdataset,
}
_FAULTS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, zstandard.ZstdError, *PARQUET_FAULTS)
_SIDE_FILES = {".bin": (".idx",), ".ds": (".ds.index",)}


def read_documents(
    sources: Iterable[Source], config: CorpusConfig, *, on_bytes: OnBytes | None = None
) -> Iterator[Document]:
    """Yield every document of every source (or part of one), in order; texts may be empty.

    Args:
        sources: what `find_sources` or `splitting.split_source` returns.
        config: how files become documents.
        on_bytes: called with the number of stored bytes read since the last call, for progress.

    Raises:
        DataError: an input cannot be read; the message names file and line.
    """
    report = on_bytes or (lambda _count: None)
    for source in sources:
        if source.is_file:
            yield from _read_file(source, config, report)
        else:
            yield from read_hub(source.name, config)


def read_rows(path: Path, config: CorpusConfig | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line (or row) number, from 1, and columns of every row of one jsonl, csv, tsv or parquet file.

    Raises:
        DataError: the file cannot be read or has no rows by its format; the message names file and line.
    """
    config = config or CorpusConfig()
    kind = file_format(path, config)
    if kind in _WHOLE_READERS:
        raise DataError(f"{path}: a {kind} file has no columns; use jsonl, csv, tsv or parquet")
    source = Source(str(path), None)
    with faults_named(path):
        if kind == "parquet":
            yield from parquet_rows(source, lambda _count: None, None)
        else:
            yield from read_text_rows(source, kind, config, lambda _count: None)


def _read_file(source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    path = Path(source.name)
    kind = file_format(path, config)
    with faults_named(path):
        if kind in _WHOLE_READERS:
            yield from _WHOLE_READERS[kind](source, config, report)
            return
        if kind == "parquet":
            columns = [config.text_field] + ([config.id_field] if config.id_field else [])
            rows = parquet_rows(source, report, columns)
        else:
            rows = read_text_rows(source, kind, config, report)
        for number, row in rows:
            yield row_document(row, config, place=f"{path}:{number}")


@contextlib.contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into one `DataError` that names it."""
    try:
        yield
    except _FAULTS as error:
        raise DataError(f"{path}: cannot be read to its end: {error}. The file may be cut: copy it again") from error


def source_sha256(source: Source) -> str:
    """SHA-256 in hex of a file and of the index file beside it that decides its documents (Megatron, datatrove)."""
    path = Path(source.name)
    digest = file_sha256(path)
    for suffix in _SIDE_FILES.get(path.suffix, ()):
        side = path.with_suffix(suffix)
        if side.is_file():
            digest = hashlib.sha256(f"{digest} {file_sha256(side)}".encode()).hexdigest()
    return digest


def corpus_identity(config: CorpusConfig) -> dict[str, Any]:
    """The settings that decide documents, as plain data: an input tokenizer counts by content, not by place.

    Raises:
        DataError: the input tokenizer's folder holds no tokenizer.json.
    """
    data: dict[str, Any] = config.model_dump(mode="json")
    if config.input_tokenizer is not None:
        path = Path(config.input_tokenizer) / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no such file. --input-tokenizer takes a folder with a tokenizer.json")
        data["input_tokenizer"] = file_sha256(path)
    return data
