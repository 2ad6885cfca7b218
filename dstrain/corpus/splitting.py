"""Cut sources into parts that processes can read apart; the parts in order give the documents of the whole, ids included.

Cheap cuts only: uncompressed jsonl and txt (lines, paragraphs) by ranges of bytes, parquet by row groups, Megatron, .ds
and plain MDS files by documents. Everything else (compressed text, csv, whole txt files, `hf:`) stays one part, so a
large corpus is best kept in many files of some 100 MB. Depends on the files and `target_bytes` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dstrain.base.errors import DataError
from dstrain.corpus.datatrove import open_datatrove
from dstrain.corpus.documents import faults_named
from dstrain.corpus.mds import is_packed, read_mds_header
from dstrain.corpus.megatron import open_megatron
from dstrain.corpus.sources import COMPRESSED, CorpusConfig, Source, file_format
from dstrain.corpus.tables import parquet_group_rows

_CHUNK_BYTES = 8 << 20


def split_source(source: Source, config: CorpusConfig, *, target_bytes: int) -> list[Source]:
    """Cut a source into parts of about `target_bytes` stored bytes; sizes of the parts sum to the source's.

    jsonl and txt files above the target are read once, to count lines (a scan for line ends, at the disk's speed); all
    other formats by their index or header. For map tasks: split every source once, give each task some parts, and call
    `read_documents([part], config)`.

    Raises:
        DataError: the file is damaged where its parts are described; the message names it.
    """
    if target_bytes < 1:
        raise DataError(f"target_bytes={target_bytes}: must be at least 1")
    if not source.is_file or source.is_part or (source.size_bytes or 0) <= target_bytes:
        return [source]
    path = Path(source.name)
    if path.suffix.lower() in COMPRESSED:
        return [source]
    kind = file_format(path, config)
    with faults_named(path):
        if kind == "jsonl" or (kind == "txt" and config.split != "file"):
            return list(_line_parts(source, config, target_bytes, at_blank=kind == "txt" and config.split != "lines"))
        if kind == "parquet":
            return _group_parts(source, parquet_group_rows(path), target_bytes)
        if kind == "megatron":
            return _even_parts(source, open_megatron(path).num_documents, target_bytes)
        if kind == "datatrove":
            return _even_parts(source, open_datatrove(path).num_documents, target_bytes)
        if kind == "mds" and not is_packed(path):
            with open(path, "rb") as stream:
                return _even_parts(source, read_mds_header(stream, place=str(path)).num_samples, target_bytes)
    return [source]


def _line_parts(source: Source, config: CorpusConfig, target_bytes: int, *, at_blank: bool) -> Iterator[Source]:
    size = source.size_bytes or 0
    start = rows = 0
    with open(source.name, "rb", buffering=1 << 20) as stream:
        while start < size:
            stop, lines = _next_cut(stream, start, target_bytes, config, at_blank=at_blank, name=source.name)
            stop = min(stop, size)  # a file that grows meanwhile is read as it was found
            yield dataclasses.replace(source, size_bytes=stop - start, start=start, stop=stop, first_row=rows)
            start, rows = stop, rows + lines


def _next_cut(
    stream: IO[bytes], start: int, target_bytes: int, config: CorpusConfig, *, at_blank: bool, name: str
) -> tuple[int, int]:
    """End of the part that begins at `start`, and its number of lines: after the target, where a document may begin."""
    lines, at = 0, start
    while (want := min(_CHUNK_BYTES, start + target_bytes - at)) > 0:
        chunk = stream.read(want)
        if not chunk:
            return at, lines
        at += len(chunk)
        lines += chunk.count(b"\n")
    while line := stream.readline(config.max_document_bytes + 1):
        if len(line) > config.max_document_bytes:
            # The reader would refuse this line; say so now, before tasks are made.
            raise DataError(f"{name}: a line at byte {at} is longer than {config.max_document_bytes} bytes")
        at += len(line)
        lines += line.endswith(b"\n")
        # The first of these may be the tail of a line that began before the target.
        if not at_blank or (not line.strip() and at - len(line) > start + target_bytes):
            break
    return at, lines


def _group_parts(source: Source, group_rows: list[int], target_bytes: int) -> list[Source]:
    """Row groups gathered to `target_bytes`, each group counted with its share of the rows."""
    size, total = source.size_bytes or 0, max(sum(group_rows), 1)
    parts: list[Source] = []
    first = rows_before = rows = 0
    done_bytes = 0
    for group, count in enumerate(group_rows):
        rows += count
        upto = size * (rows_before + rows) // total
        is_last = group == len(group_rows) - 1
        if upto - done_bytes >= target_bytes or is_last:
            stop_bytes = size if is_last else upto
            part = dataclasses.replace(source, size_bytes=stop_bytes - done_bytes, start=first, stop=group + 1)
            parts.append(dataclasses.replace(part, first_row=rows_before))
            first, rows_before, rows, done_bytes = group + 1, rows_before + rows, 0, stop_bytes
    return parts or [source]


def _even_parts(source: Source, documents: int, target_bytes: int) -> list[Source]:
    size = source.size_bytes or 0
    count = min(-(-size // target_bytes), documents)
    if count < 2:
        return [source]
    cuts = [documents * k // count for k in range(count + 1)]
    sizes = [size * k // count for k in range(count + 1)]
    return [
        dataclasses.replace(
            source, size_bytes=sizes[k + 1] - sizes[k], start=cuts[k], stop=cuts[k + 1], first_row=cuts[k]
        )
        for k in range(count)
    ]
