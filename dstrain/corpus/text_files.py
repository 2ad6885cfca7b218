"""Read txt, jsonl, csv and tsv files, plain or .gz or .zst, as documents or rows, whole or by ranges of bytes.

Compressed input streams in bounded memory and is read whole. A range of an uncompressed file starts and ends at line
starts, which `splitting` finds. No archive is extracted.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import zstandard

from dstrain.base.errors import DataError
from dstrain.base.text_encoding import conversion_advice
from dstrain.corpus.sources import CorpusConfig, Document, Format, OnBytes, Source, file_format


class _Counted(io.RawIOBase):
    """A range of a raw file that reports how many bytes were read."""

    def __init__(self, source: Source, report: OnBytes):
        super().__init__()
        self._file = open(source.name, "rb", buffering=0)  # closed by close()
        self._report = report
        self._left: int | None = None
        if source.start is not None and source.stop is not None:
            self._file.seek(source.start)
            self._left = source.stop - source.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer) if self._left is None else memoryview(buffer)[: self._left]
        count = self._file.readinto(view) or 0
        if self._left is not None:
            self._left -= count
        self._report(count)
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Decompressed zstd frames, back to back. zstandard's own reader takes a cut file for a complete one."""

    # A frame can grow 32,000-fold, so small pieces of input keep a bomb's output bounded.
    _PIECE_BYTES = 4096

    def __init__(self, raw: IO[bytes]):
        super().__init__()
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._frame.unused_data or self._raw.read(self._PIECE_BYTES)
            if not piece:
                if self._is_inside:
                    raise EOFError("the zstd stream ends in the middle of a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(piece))
            self._is_inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_stream(source: Source, report: OnBytes) -> IO[bytes]:
    """Open a file (or its range) for reading, decompressed by its ending; stored bytes are reported as they are read.

    Reading raises OSError, EOFError, zlib.error or zstandard.ZstdError for a damaged archive.
    """
    raw = io.BufferedReader(_Counted(source, report), buffer_size=1 << 20)
    suffix = Path(source.name).suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), buffer_size=1 << 20)
    if suffix in (".zst", ".zstd"):
        return io.BufferedReader(_Zstd(raw), buffer_size=1 << 20)
    return raw


def read_txt(source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    """Yield the documents of a txt file as `config.split` cuts it.

    Raises:
        DataError: a line is not UTF-8, or a line or document is too long.
    """
    path = source.name
    with open_stream(source, report) as stream:
        lines = _lines(source, stream, config)
        if config.split == "lines":
            for number, line in lines:
                yield Document(f"{path}:{number}", line.rstrip("\r\n"))
            return
        gathered: list[str] = []
        size, first = 0, 1
        for number, line in lines:
            if config.split == "blank-lines" and not line.strip():
                if gathered:
                    yield Document(f"{path}:{first}", "".join(gathered).strip())
                gathered, size = [], 0
                continue
            if not gathered:
                first = number
            gathered.append(line)
            size += len(line)
            if size > config.max_document_bytes:
                raise DataError(
                    f"{path}:{first}: this document is longer than {config.max_document_bytes} bytes; "
                    "cut the file with --split blank-lines or --split lines"
                )
        if gathered:
            yield Document(str(path) if config.split == "file" else f"{path}:{first}", "".join(gathered).strip())


def read_text_rows(
    source: Source, kind: Format, config: CorpusConfig, report: OnBytes
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line number, from 1, and fields of every row of a jsonl, csv or tsv file.

    Raises:
        DataError: a line is no row; the message names file and line.
    """
    with open_stream(source, report) as stream:
        yield from _json_rows(source, stream, config) if kind == "jsonl" else _table_rows(source, stream, config)


def _lines(source: Source, stream: IO[bytes], config: CorpusConfig) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, its line end kept; a byte order mark at the start is dropped."""
    offset = source.start or 0
    limit = config.max_document_bytes
    number = source.first_row
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise DataError(f"{source.name}:{number}: this line is longer than {limit} bytes (--max-document-bytes)")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source.name}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start} "
                f"of the text ({error.reason}). {conversion_advice(line)}"
            ) from None
        offset += len(line)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _json_rows(source: Source, stream: IO[bytes], config: CorpusConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in _lines(source, stream, config):
        if not line.strip():
            continue
        place = f"{source.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{place}: not valid JSON: {reason}. Each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: each line must be a JSON object, found {type(row).__name__}")
        yield number, row


def _table_rows(source: Source, stream: IO[bytes], config: CorpusConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # csv keeps its field limit in the module; documents are longer than its 128 KiB default.
    csv.field_size_limit(config.max_document_bytes)
    path = source.name
    tabs = file_format(Path(path), config) == "tsv"
    texts = (text for _, text in _lines(source, stream, config))
    # TSV has no quotes: a field that begins with one is text. Tabs and newlines cannot stand in a field.
    reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(texts, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{path}:{reader.line_num}: {len(row)} fields, the header has {len(header)}")
            yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: cannot be read as {'TSV' if tabs else 'CSV'}: {error}") from None
