"""What a corpus is made of: settings, documents, and the inputs that hold them; patterns and folders become sources.

Opens no input but the `index.json` of an MDS folder. The readers (`text_files`, `tables`, `megatron`, `mds`,
`datatrove`) build on these types; `documents` joins them.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.base.storage import read_json
from dstrain.foreign.tar_inputs import find_tars

Format = Literal["auto", "txt", "jsonl", "csv", "tsv", "parquet", "megatron", "mds", "datatrove", "webdataset"]
_FORMATS: Mapping[str, Format] = {
    ".txt": "txt",
    ".text": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".bin": "megatron",
    ".idx": "megatron",
    ".mds": "mds",
    ".ds": "datatrove",
    ".tar": "webdataset",
}
COMPRESSED = (".gz", ".zst", ".zstd")
KNOWN = (
    "txt, jsonl, csv, tsv (each also .gz or .zst), parquet, Megatron .bin/.idx, MDS folders or .mds files, "
    "datatrove .ds, WebDataset .tar or wds:FOLDER, or hf:NAME"
)
MDS_INDEX = "index.json"


class CorpusConfig(Config):
    """How files become documents."""

    text_field: str = "text"
    """Name of the field or column with the text, in jsonl, csv, tsv, parquet, MDS and hf: inputs."""
    id_field: str | None = None
    """Field with the document's name; without it a document is named file:line (or file:row)."""
    format: Format = "auto"
    """Format of files; auto goes by the name, e.g. .jsonl.gz."""
    split: Literal["file", "blank-lines", "lines"] = "file"
    """How txt files are cut into documents: whole files, paragraphs between blank lines, or single lines."""
    max_document_bytes: int = Field(default=64 << 20, ge=1, le=1 << 31)
    """Longest line, row or document accepted, in bytes: a broken or hostile file cannot fill the memory."""
    input_tokenizer: str | None = None
    """Folder with the tokenizer.json that made the ids of already tokenised inputs (Megatron, .ds, MDS arrays)."""


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    id: str
    text: str


@dataclass(frozen=True)
class Source:
    """One input, or a part of one: a file, or a dataset that `datasets.load_dataset` names.

    `dstrain.corpus.splitting.split_source` cuts a source into parts; the parts, read in order, give the documents of
    the whole with the same ids. A part is plain data: it pickles, and reads alike in any process on any node that sees
    the file.
    """

    name: str
    """The path, or the hf: text."""
    size_bytes: int | None
    """Stored size of the file or of this part; None where it is not known."""
    start: int | None = None
    """First of a part: byte of a txt or jsonl file, row group of parquet, document of Megatron, .ds and .mds files."""
    stop: int | None = None
    """One after the part's last; both are None for a whole file."""
    first_row: int = 0
    """Lines, rows or documents of the file before this part: ids and messages count from there."""

    @property
    def is_file(self) -> bool:
        """Whether this is a file on disk."""
        return not self.name.startswith("hf:")

    @property
    def is_part(self) -> bool:
        """Whether this is less than the whole file."""
        return self.start is not None


OnBytes = Callable[[int], None]


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Expand files, patterns, MDS folders and `hf:` names into sources, sorted by name, each once.

    Args:
        inputs: paths, glob patterns (`**` works), folders with an MDS `index.json`, or
            `hf:OWNER/NAME[/CONFIG][:SPLIT]` / `hf:FOLDER[:SPLIT]`, or `wds:FOLDER` for all
            WebDataset tars below it. Of a Megatron pair either file may be named.

    Raises:
        DataError: nothing was given, a file is missing, or a pattern matches nothing.
    """
    if not inputs:
        raise DataError("no input given: name files, patterns such as 'corpus/*.jsonl.gz', or hf:NAME")
    names: set[str] = set()
    for text in inputs:
        if text.startswith("wds:"):
            names.update(str(tar) for tar in find_tars([text.removeprefix("wds:")])[1])
        else:
            names.update([text] if text.startswith("hf:") else map(_data_file, _expand(text)))
    return [Source(n, None if n.startswith("hf:") else Path(n).stat().st_size) for n in sorted(names)]


def _data_file(name: str) -> str:
    """A Megatron pair is named by its .bin, whichever of the two was given."""
    path = Path(name)
    if path.suffix != ".idx":
        return name
    data = path.with_suffix(".bin")
    if not data.is_file():
        raise DataError(f"{path}: its data file {data} is missing; Megatron writes the two side by side")
    return str(data)


def _expand(text: str) -> list[str]:
    path = Path(text)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        if (path / MDS_INDEX).is_file():
            return _mds_shards(path)
        raise DataError(
            f"{text}: is a folder; say which files in it, e.g. '{path / '*.jsonl.gz'}' (a folder with an MDS index.json is read as a whole)"
        )
    if not glob.has_magic(text):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
        hint = f" Did you mean {', '.join(str(path.parent / n) for n in near)}?" if near else ""
        raise DataError(f"{text}: no such input file.{hint}")
    files = [name for name in glob.glob(text, recursive=True) if Path(name).is_file()]
    if not files:
        raise DataError(f"{text}: this pattern matches no file (from {Path.cwd()}); quote patterns in the shell")
    return files


def _mds_shards(folder: Path) -> list[str]:
    """Shard files that an MDS index.json names, sizes checked; the unpacked one where both forms are there."""
    place = folder / MDS_INDEX
    data = read_json(place)
    shards = data.get("shards") if isinstance(data, dict) else None
    if not isinstance(shards, list) or data.get("version") != 2:
        raise DataError(f"{place}: not an MDS index (version 2 with a list of shards)")
    return [_mds_shard(folder, shard, place=f"{place}: shard {number}") for number, shard in enumerate(shards)]


def _mds_shard(folder: Path, shard: Any, *, place: str) -> str:
    if not isinstance(shard, dict) or shard.get("format") != "mds":
        raise DataError(f"{place}: not in MDS format; convert the dataset to MDS or jsonl")
    missing = []
    for key in ("raw_data", "zip_data"):
        info = shard.get(key)
        if info is None:
            continue
        name = info.get("basename") if isinstance(info, dict) else None
        # The index is data: it must not lead out of its folder.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise DataError(f"{place}: {key} names no file of this folder: {name!r}")
        path = folder / name
        if not path.is_file():
            missing.append(name)
            continue
        if path.stat().st_size != info.get("bytes"):
            raise DataError(f"{path}: {path.stat().st_size} bytes, {place} says {info.get('bytes')}: copy it again")
        return str(path)
    raise DataError(f"{place}: its file is missing: {' or '.join(missing) or 'none is named'}")


def file_format(path: Path, config: CorpusConfig) -> Format:
    """Format of a file by configuration or name.

    Raises:
        DataError: the name does not tell.
    """
    if config.format != "auto":
        return config.format
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    found = _FORMATS.get(suffixes[-1]) if suffixes else None
    if found is None:
        raise DataError(f"{path}: cannot tell the format by the name. Known: {KNOWN}. Name it with --format")
    return found


def row_document(row: Mapping[str, Any], config: CorpusConfig, *, place: str) -> Document:
    """The document in a row of fields, named by `id_field` or by its place.

    Raises:
        DataError: the text field is absent or holds no Unicode text.
    """
    if config.text_field not in row:
        raise DataError(missing_field(config.text_field, list(row), place=place))
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
        message = missing_field(str(config.id_field), list(row), place=place)
        raise DataError(message.replace("--text-field", "--id-field"))
    return Document(str(name), text)


def missing_field(name: str, found: Sequence[str], *, place: str) -> str:
    """The sentence that says which fields there are instead."""
    shown = ", ".join(repr(field) for field in list(found)[:12]) or "none"
    return f"{place}: no field {name!r}; it has {shown}.{separator_advice(found) or ' Choose one with --text-field'}"


def separator_advice(columns: Sequence[str]) -> str:
    """What to do about a table whose only column's name looks like several, separated by another character; or nothing."""
    if len(columns) != 1:
        return ""
    for separator, mend in (
        ("\t", "name the file .tsv"),
        (",", "name the file .csv"),
        (";", "separate them by tabs or commas"),
    ):
        if separator in columns[0]:
            return f" The columns seem to be separated by {separator!r}: {mend}"
    return ""
