"""Read text corpora as a stream of documents: txt, jsonl, csv, tsv (all also .gz, .zst), parquet, and `hf:` datasets.

The door to `datasets` and `pyarrow`. Compressed input streams in bounded memory. Every fault is a `DataError` that
names file, line (or row) and mend: bytes that are not UTF-8, a row without the text field, JSON that cannot be read, a
pattern that matches nothing. No remote code is run, no archive is extracted. Does not tokenise, filter or shuffle.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import pyarrow
import pyarrow.parquet
import zstandard
from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError

Format = Literal["auto", "txt", "jsonl", "csv", "tsv", "parquet"]
_FORMATS: Mapping[str, Format] = {
    ".txt": "txt",
    ".text": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst")
_KNOWN = "txt, jsonl, csv, tsv (each also .gz or .zst), parquet, or hf:NAME"


class CorpusConfig(Config):
    """How files become documents."""

    text_field: str = "text"
    """Name of the field or column with the text, in jsonl, csv, tsv, parquet and hf: inputs."""
    id_field: str | None = None
    """Field with the document's name; without it a document is named file:line."""
    format: Format = "auto"
    """Format of files; auto goes by the name, e.g. .jsonl.gz."""
    split: Literal["file", "blank-lines", "lines"] = "file"
    """How txt files are cut into documents: whole files, paragraphs between blank lines, or single lines."""
    max_document_bytes: int = Field(default=64 << 20, ge=1, le=1 << 31)
    """Longest line or txt document accepted, in bytes: a broken or hostile file cannot fill the memory."""


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    id: str
    text: str


@dataclass(frozen=True)
class Source:
    """One input: a file, or a dataset that `datasets.load_dataset` names."""

    name: str
    """The path, or the hf: text."""
    size_bytes: int | None
    """Stored size; None where it is not known."""

    @property
    def is_file(self) -> bool:
        """Whether this is a file on disk."""
        return not self.name.startswith("hf:")


OnBytes = Callable[[int], None]


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Expand files, folders' patterns and `hf:` names into sources, sorted by name, each once.

    Args:
        inputs: paths, glob patterns (`**` works), or `hf:OWNER/NAME[/CONFIG][:SPLIT]` / `hf:FOLDER[:SPLIT]`.

    Raises:
        DataError: nothing was given, a file is missing, or a pattern matches nothing.
    """
    if not inputs:
        raise DataError("no input given: name files, patterns such as 'corpus/*.jsonl.gz', or hf:NAME")
    names: set[str] = set()
    for text in inputs:
        names.update([text] if text.startswith("hf:") else _expand(text))
    return [Source(n, None if n.startswith("hf:") else Path(n).stat().st_size) for n in sorted(names)]


def _expand(text: str) -> list[str]:
    path = Path(text)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        raise DataError(f"{text}: is a folder; say which files in it, e.g. '{path / '*.jsonl.gz'}'")
    if not glob.has_magic(text):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
        hint = f" Did you mean {', '.join(str(path.parent / n) for n in near)}?" if near else ""
        raise DataError(f"{text}: no such input file.{hint}")
    files = [name for name in glob.glob(text, recursive=True) if Path(name).is_file()]
    if not files:
        raise DataError(f"{text}: this pattern matches no file (from {Path.cwd()}); quote patterns in the shell")
    return files


def read_documents(
    sources: Iterable[Source], config: CorpusConfig, *, on_bytes: OnBytes | None = None
) -> Iterator[Document]:
    """Yield every document of every source, in order; texts may be empty.

    Args:
        sources: what `find_sources` returns.
        config: how files become documents.
        on_bytes: called with the number of stored bytes read since the last call, for progress.

    Raises:
        DataError: an input cannot be read; the message names file and line.
    """
    report = on_bytes or (lambda _count: None)
    for source in sources:
        if source.is_file:
            yield from _read_file(Path(source.name), config, report)
        else:
            yield from _read_hub(source.name, config)


def file_format(path: Path, config: CorpusConfig) -> Format:
    """Format of a file by configuration or name.

    Raises:
        DataError: the name does not tell.
    """
    if config.format != "auto":
        return config.format
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    found = _FORMATS.get(suffixes[-1]) if suffixes else None
    if found is None:
        raise DataError(f"{path}: cannot tell the format by the name. Known: {_KNOWN}. Name it with --format")
    return found


def read_rows(path: Path, config: CorpusConfig | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line (or row) number, from 1, and columns of every row of one jsonl, csv, tsv or parquet file.

    Raises:
        DataError: the file cannot be read or has no rows by its format; the message names file and line.
    """
    config = config or CorpusConfig()
    kind = file_format(path, config)
    if kind == "txt":
        raise DataError(f"{path}: a txt file has no columns; use jsonl, csv, tsv or parquet")
    with _faults_named(path):
        yield from _file_rows(path, kind, config, lambda _count: None, columns=None)


def _read_file(path: Path, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    kind = file_format(path, config)
    with _faults_named(path):
        if kind == "txt":
            with _open(path, report) as stream:
                yield from _read_txt(path, stream, config)
            return
        columns = [config.text_field] + ([config.id_field] if config.id_field else [])
        for number, row in _file_rows(path, kind, config, report, columns=columns):
            yield _document(row, config, place=f"{path}:{number}")


@contextlib.contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read to its end: {error}. The file may be cut: copy it again") from error


def _file_rows(
    path: Path, kind: Format, config: CorpusConfig, report: OnBytes, *, columns: Sequence[str] | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if kind == "parquet":
        yield from _parquet_rows(path, report, columns)
        return
    with _open(path, report) as stream:
        yield from _json_rows(path, stream, config) if kind == "jsonl" else _table_rows(path, stream, config)


class _Counted(io.RawIOBase):
    """A raw file that reports how many bytes were read."""

    def __init__(self, path: Path, report: OnBytes):
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # closed by close()
        self._report = report

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
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


def _open(path: Path, report: OnBytes) -> IO[bytes]:
    raw = io.BufferedReader(_Counted(path, report), buffer_size=1 << 20)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), buffer_size=1 << 20)
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(raw), buffer_size=1 << 20)
    return raw


def _lines(path: Path, stream: IO[bytes], config: CorpusConfig) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, its line end kept; a byte order mark at the start is dropped."""
    offset = 0
    limit = config.max_document_bytes
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise DataError(f"{path}:{number}: this line is longer than {limit} bytes (--max-document-bytes)")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start} of the "
                f"text ({error.reason}). Convert the file, e.g. `iconv -f WINDOWS-1252 -t UTF-8`"
            ) from None
        offset += len(line)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_txt(path: Path, stream: IO[bytes], config: CorpusConfig) -> Iterator[Document]:
    gathered: list[str] = []
    size, first = 0, 1
    for number, line in _lines(path, stream, config):
        if config.split == "lines":
            yield Document(f"{path}:{number}", line.rstrip("\r\n"))
            continue
        blank = not line.strip()
        if config.split == "blank-lines" and blank:
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


def _json_rows(path: Path, stream: IO[bytes], config: CorpusConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in _lines(path, stream, config):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}:{number}: not valid JSON: {reason}. Each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: each line must be a JSON object, found {type(row).__name__}")
        yield number, row


def _table_rows(path: Path, stream: IO[bytes], config: CorpusConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # csv keeps its field limit in the module; documents are longer than its 128 KiB default.
    csv.field_size_limit(config.max_document_bytes)
    tabs = file_format(path, config) == "tsv"
    texts = (text for _, text in _lines(path, stream, config))
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


def _parquet_rows(
    path: Path, report: OnBytes, columns: Sequence[str] | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        missing = next((name for name in columns or () if name not in names), None)
        if missing is not None:
            raise DataError(_no_field(missing, names, place=str(path)))
        row_number = 0
        num_groups = max(file.num_row_groups, 1)
        size = path.stat().st_size
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for row in _rows(batch, place=f"{path}: row {row_number}"):
                    row_number += 1
                    yield row_number, row
            report(size * (group + 1) // num_groups - size * group // num_groups)


def _rows(batch: Any, *, place: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{place} or one of the next {len(batch)}: not UTF-8: {error}") from None
    return rows


def _read_hub(name: str, config: CorpusConfig) -> Iterator[Document]:
    target, configuration, split = parse_hub_name(name)
    try:
        # Streaming reads text as it comes and prepares no cache; scripts inside datasets are never run.
        rows = datasets.load_dataset(target, configuration, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _document(row, config, place=f"{name}:{number + 1}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: datasets.load_dataset({target!r}, {configuration!r}, split={split!r}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def parse_hub_name(name: str) -> tuple[str, str | None, str]:
    """Split `hf:OWNER/NAME[/CONFIG][:SPLIT]` or `hf:FOLDER[:SPLIT]` into what `load_dataset` takes.

    Raises:
        DataError: there is no name.
    """
    target, _, split = name.removeprefix("hf:").partition(":")
    if not target.strip("/"):
        raise DataError(
            f"{name!r}: write hf:OWNER/NAME[/CONFIG][:SPLIT], for example hf:Salesforce/wikitext/wikitext-2-v1"
        )
    if Path(target).is_dir():
        return target, None, split or "train"
    parts = target.split("/")
    configuration = "/".join(parts[2:]) or None
    return "/".join(parts[:2]), configuration, split or "train"


def _document(row: Mapping[str, Any], config: CorpusConfig, *, place: str) -> Document:
    if config.text_field not in row:
        raise DataError(_no_field(config.text_field, list(row), place=place))
    text = row[config.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: the field {config.text_field!r} holds {type(text).__name__}, not text. "
            "Choose another with --text-field, or leave such rows out"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no encoding holds.
        raise DataError(f"{place}: the text is not valid Unicode: {error.reason} at character {error.start}") from None
    name = place if config.id_field is None else row.get(config.id_field)
    if name is None:
        raise DataError(_no_field(str(config.id_field), list(row), place=place).replace("--text-field", "--id-field"))
    return Document(str(name), text)


def _no_field(name: str, found: Sequence[str], *, place: str) -> str:
    shown = ", ".join(repr(field) for field in list(found)[:12]) or "none"
    return f"{place}: no field {name!r}; it has {shown}. Choose one with --text-field"
