r"""Read Megatron-LM's `.bin`/`.idx` pairs: ids become text again, one document for each of Megatron's documents.

The index layout is that of `megatron/core/datasets/indexed_dataset.py` (version 1): 9 bytes `MMIDIDX\0\0`, u64 version,
u8 dtype code, u64 sequences, u64 document marks, then i32 lengths, i64 byte offsets, i64 marks, and for multimodal data
one i8 per sequence, all little-endian. Everything is checked against the sizes of the two files before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.corpus.input_ids import ids_at, token_decoder
from dstrain.corpus.sources import CorpusConfig, Document, OnBytes, Source

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<QBQQ")
# Codes of Megatron's DType enumeration; floating point (6, 7) holds no ids.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_STEP = 1 << 16  # documents whose index entries are checked at once


@dataclass(frozen=True)
class MegatronIndex:
    """The index of one pair, mapped into memory, not read."""

    path: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    """(sequences,) ids in each."""
    offsets: npt.NDArray[np.int64]
    """(sequences,) byte of the first id."""
    marks: npt.NDArray[np.int64]
    """(documents + 1,) first sequence of each document, and the end."""

    @property
    def num_documents(self) -> int:
        """Documents in the pair."""
        return len(self.marks) - 1


def open_megatron(data_path: Path) -> MegatronIndex:
    """Open the `.idx` beside a `.bin`.

    Raises:
        DataError: it is missing, is no index, or its size is not what its header says.
    """
    path = data_path.with_suffix(".idx")
    if not path.is_file():
        raise DataError(f"{path}: missing; Megatron writes {data_path.name} and {path.name} side by side")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(_MAGIC) + _HEAD.size)
    if len(head) < len(_MAGIC) + _HEAD.size or not head.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron index: it does not begin with MMIDIDX")
    version, code, sequences, marks = _HEAD.unpack_from(head, len(_MAGIC))
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{path}: version {version}, dtype code {code}: dstrain reads version 1 with integer ids")
    at = len(head)
    needed = at + 12 * sequences + 8 * marks
    if marks < 1 or size not in (needed, needed + sequences):
        raise DataError(
            f"{path}: {size} bytes, but {sequences} sequences and {marks} document marks take {needed}: copy it again"
        )
    index = MegatronIndex(
        path,
        np.dtype(_DTYPES[code]),
        _mapped(path, "<i4", at, sequences),
        _mapped(path, "<i8", at + 4 * sequences, sequences),
        _mapped(path, "<i8", at + 12 * sequences, marks),
    )
    if int(index.marks[0]) != 0 or int(index.marks[-1]) != sequences:
        raise DataError(f"{path}: the document marks do not cover all {sequences} sequences: the index is damaged")
    return index


def _mapped(path: Path, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
    if count == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def read_megatron(source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    """Yield the documents [start, stop) of a pair as text, named file:document.

    Sequences of one document (sentences, where the data was made with --split-sentences) are joined by a space.

    Raises:
        DataError: no tokenizer is named, or index and data do not fit; the message names file and document.
    """
    path = Path(source.name)
    index = open_megatron(path)
    decoder = token_decoder(config, place=str(path))
    stop = index.num_documents if source.stop is None else source.stop
    with open(path, "rb", buffering=1 << 20) as stream:
        for first in range(source.start or 0, stop, _STEP):
            last = min(first + _STEP, stop)
            marks = _checked_marks(index, first, last)
            begin = marks[0]
            lengths, offsets = _checked_sequences(index, begin, marks[-1], path, config)
            for number in range(first, last):
                low, high = marks[number - first] - begin, marks[number - first + 1] - begin
                place = f"{path}:{number + 1}"
                stored = sum(lengths[low:high]) * index.dtype.itemsize
                if stored > config.max_document_bytes:
                    raise DataError(f"{place}: longer than {config.max_document_bytes} bytes (--max-document-bytes)")
                texts = [
                    decoder.text(ids_at(stream, offsets[k], lengths[k], index.dtype, place=place), place=place)
                    for k in range(low, high)
                ]
                report(stored)
                yield Document(place, " ".join(texts))


def _checked_marks(index: MegatronIndex, first: int, last: int) -> list[int]:
    marks = np.array(index.marks[first : last + 1], dtype=np.int64)
    if (np.diff(marks) < 0).any() or marks[0] < 0 or marks[-1] > len(index.lengths):
        raise DataError(f"{index.path}: the marks of documents {first + 1} to {last} do not rise: the index is damaged")
    result: list[int] = marks.tolist()
    return result


def _checked_sequences(
    index: MegatronIndex, begin: int, end: int, data_path: Path, config: CorpusConfig
) -> tuple[list[int], list[int]]:
    lengths = np.array(index.lengths[begin:end], dtype=np.int64)
    offsets = np.array(index.offsets[begin:end], dtype=np.int64)
    size = data_path.stat().st_size
    # Compared without adding, which could overflow.
    bad = np.flatnonzero((lengths < 0) | (offsets < 0) | (lengths > (size - offsets) // index.dtype.itemsize))
    if len(bad):
        k = int(bad[0])
        raise DataError(
            f"{index.path}: sequence {begin + k}: {lengths[k]} ids at byte {offsets[k]} are not inside {data_path} "
            f"({size} bytes): one of the two files is cut or of another pair"
        )
    return lengths.tolist(), offsets.tolist()
