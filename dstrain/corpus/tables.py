"""The door to `datasets` and `pyarrow`: rows of parquet files and of `hf:` datasets.

Parquet is read batch by batch, whole or by row groups; `hf:` names stream and prepare no cache. No remote code is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from dstrain.base.errors import DataError
from dstrain.corpus.sources import CorpusConfig, Document, OnBytes, Source, missing_field, row_document

PARQUET_FAULTS: tuple[type[Exception], ...] = (pyarrow.ArrowException,)
"""What reading a damaged parquet file raises, beside OSError."""


def parquet_group_rows(path: Path) -> list[int]:
    """Rows of each row group of a parquet file.

    Raises:
        pyarrow.ArrowException or OSError: this is no parquet file.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def parquet_rows(
    source: Source, report: OnBytes, columns: Sequence[str] | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield row number, from 1, and columns of every row of a file or of its row groups [start, stop).

    Raises:
        DataError: a column is missing or is not UTF-8.
        pyarrow.ArrowException or OSError: the file is damaged.
    """
    path = Path(source.name)
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        missing = next((name for name in columns or () if name not in names), None)
        if missing is not None:
            raise DataError(missing_field(missing, names, place=str(path)))
        groups = range(source.start or 0, file.num_row_groups if source.stop is None else source.stop)
        size = source.size_bytes or path.stat().st_size
        row_number = source.first_row
        for done, group in enumerate(groups):
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for row in _rows(batch, place=f"{path}: row {row_number}"):
                    row_number += 1
                    yield row_number, row
            report(size * (done + 1) // len(groups) - size * done // len(groups))


def _rows(batch: Any, *, place: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{place} or one of the next {len(batch)}: not UTF-8: {error}") from None
    return rows


def read_hub(name: str, config: CorpusConfig) -> Iterator[Document]:
    """Yield the documents of an `hf:` dataset, streamed.

    Raises:
        DataError: the dataset cannot be read, or a row holds no text.
    """
    target, configuration, split = parse_hub_name(name)
    try:
        # Streaming reads text as it comes and prepares no cache; scripts inside datasets are never run.
        rows = datasets.load_dataset(target, configuration, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield row_document(row, config, place=f"{name}:{number + 1}")
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
