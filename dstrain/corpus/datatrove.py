"""Read datatrove's tokenised `.ds` files: ids become text again. Its jsonl and parquet output needs no reader of its own.

Layout, as `datatrove/pipeline/tokens/tokenizer.py` writes it: `X.ds` holds ids of 2 or 4 bytes, `X.ds.index` the
cumulative document ends as u64, `X.ds.metadata` (merged files only) a first line `tokenizer|bytes per id`; all
little-endian. `X.ds.loss`, a mask for chat data, is not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.corpus.input_ids import ids_at, token_decoder
from dstrain.corpus.sources import CorpusConfig, Document, OnBytes, Source

_STEP = 1 << 16  # documents whose index entries are checked at once


@dataclass(frozen=True)
class DatatroveIndex:
    """The index of one file, mapped into memory, not read."""

    path: Path
    dtype: np.dtype[Any]
    ends: npt.NDArray[np.uint64]
    """(documents,) cumulative ids."""
    made_with: str | None
    """Name of the tokenizer, where the metadata tell."""

    @property
    def num_documents(self) -> int:
        """Documents in the file."""
        return len(self.ends)


def open_datatrove(data_path: Path) -> DatatroveIndex:
    """Open the `.index` beside a `.ds`; the width of ids follows from the sizes of the two.

    Raises:
        DataError: it is missing, damaged, or does not fit the data.
    """
    path = data_path.with_name(data_path.name + ".index")
    if not path.is_file():
        raise DataError(f"{path}: missing; without it the ends of documents in {data_path.name} are not known")
    size, index_size = data_path.stat().st_size, path.stat().st_size
    if index_size % 8:
        raise DataError(f"{path}: {index_size} bytes are no whole number of 8-byte ends: copy it again")
    name, width = _metadata(data_path)
    ends = np.memmap(path, dtype="<u8", mode="r") if index_size else np.zeros(0, dtype="<u8")
    count = int(ends[-1]) if len(ends) else 0
    widths = [w for w in (2, 4) if count * w == size]
    if (width is not None and width not in widths) or not widths:
        raise DataError(
            f"{data_path}: {size} bytes, but {path.name} ends at {count} ids"
            + (f" of {width} bytes each" if width else "")
            + ": one of the two files is cut or of another data set"
        )
    return DatatroveIndex(path, np.dtype(f"<u{widths[0]}"), ends, name)


def _metadata(data_path: Path) -> tuple[str | None, int | None]:
    path = data_path.with_name(data_path.name + ".metadata")
    if not path.is_file():
        return None, None
    try:
        with open(path, encoding="utf-8") as file:
            name, _, width = file.readline(4096).strip().rpartition("|")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if width not in ("2", "4"):
        raise DataError(f"{path}: the first line must end in '|2' or '|4' (bytes per id), found {width[:40]!r}")
    return name, int(width)


def read_datatrove(source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    """Yield the documents [start, stop) of a `.ds` file as text, named file:document.

    Raises:
        DataError: no tokenizer is named, or index and data do not fit; the message names file and document.
    """
    path = Path(source.name)
    index = open_datatrove(path)
    decoder = token_decoder(config, place=str(path), made_with=index.made_with)
    width = index.dtype.itemsize
    stop = index.num_documents if source.stop is None else source.stop
    with open(path, "rb", buffering=1 << 20) as stream:
        for first in range(source.start or 0, stop, _STEP):
            for number, (begin, end) in enumerate(_checked_ends(index, first, min(first + _STEP, stop)), first + 1):
                place = f"{path}:{number}"
                if (end - begin) * width > config.max_document_bytes:
                    raise DataError(f"{place}: longer than {config.max_document_bytes} bytes (--max-document-bytes)")
                ids = ids_at(stream, begin * width, end - begin, index.dtype, place=place)
                report(len(ids) * width)
                yield Document(place, decoder.text(ids, place=place))


def _checked_ends(index: DatatroveIndex, first: int, last: int) -> Iterator[tuple[int, int]]:
    ends = np.array(index.ends[max(first - 1, 0) : last])
    if first == 0:
        ends = np.concatenate([np.zeros(1, dtype=ends.dtype), ends])
    falling = np.flatnonzero(ends[1:] < ends[:-1])
    if len(falling) or ends[-1] > index.ends[-1]:
        number = first + 1 + (int(falling[0]) if len(falling) else 0)
        raise DataError(f"{index.path}: the end of document {number} is not in order: the index is damaged")
    places = ends.tolist()
    return itertools.pairwise(places)
