"""Read MosaicML Streaming's MDS shards: text columns as they are, arrays of token ids turned back into text.

A shard is u32 samples, u32[samples + 1] byte offsets, JSON with the columns' names, encodings and sizes, then the
samples: u32 sizes of the variable columns followed by the columns (`streaming/base/format/mds`, version 2). So one file
can be read without `index.json`. Shards may be packed with zstd or gzip. Only the columns that are asked for are
decoded, and never with pickle or an image library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.corpus.input_ids import token_decoder
from dstrain.corpus.sources import COMPRESSED, CorpusConfig, Document, OnBytes, Source, missing_field
from dstrain.corpus.text_files import open_stream

_CONFIG_LIMIT = 1 << 20
_SAMPLES_LIMIT = 1 << 28
_SCALARS = {"int": "<i8"} | {f"{kind}int{8 * w}": f"<{kind or 'i'}{w}" for kind in ("", "u") for w in (1, 2, 4, 8)}
# Codes of array element types that hold ids, from MDS's NDArray encoding.
_ELEMENTS = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_ELEMENT_NAMES = {f"{'u' if code % 2 == 0 else ''}int{8 * int(t[-1])}": t for code, t in _ELEMENTS.items()}
_FOUNDRY_IDS = "<i8"  # LLM Foundry's "bytes" columns of ids are int64


@dataclass(frozen=True)
class MdsHeader:
    """What stands before a shard's samples."""

    offsets: npt.NDArray[np.uint32]
    """(samples + 1,) first byte of each sample, and the end."""
    names: list[str]
    encodings: list[str]
    sizes: list[int | None]
    """Bytes of each column, None where they differ from sample to sample."""

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return len(self.offsets) - 1


def is_packed(path: Path) -> bool:
    """Whether a shard is compressed as a whole, so that it can only be read from its start."""
    return path.suffix.lower() in COMPRESSED


def read_mds_header(stream: IO[bytes], *, place: str) -> MdsHeader:
    """Read the header of a shard from its first byte on.

    Raises:
        DataError: this is no MDS shard, or it is damaged.
    """
    num_samples = int.from_bytes(_exactly(stream, 4, place=place), "little")
    if num_samples > _SAMPLES_LIMIT:
        raise DataError(f"{place}: {num_samples} samples in one shard: this is no MDS shard, or it is damaged")
    offsets = np.frombuffer(_exactly(stream, 4 * (num_samples + 1), place=place), dtype="<u4")
    length = int(offsets[0]) - 4 * (num_samples + 2)
    if not 0 < length <= _CONFIG_LIMIT or (offsets[1:] < offsets[:-1]).any():
        raise DataError(f"{place}: the table of samples does not rise from its own end: no MDS shard, or damaged")
    try:
        columns = json.loads(_exactly(stream, length, place=place))
        names, encodings, sizes = (columns[f"column_{key}"] for key in ("names", "encodings", "sizes"))
        if not (len(names) == len(encodings) == len(sizes)) or not all(
            isinstance(n, str) and isinstance(e, str) and (s is None or (type(s) is int and s >= 0))
            for n, e, s in zip(names, encodings, sizes)
        ):
            raise ValueError("names, encodings and sizes of columns do not fit")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: the description of its columns cannot be read: {error!r}") from None
    return MdsHeader(offsets, list(names), list(encodings), list(sizes))


def _exactly(stream: IO[bytes], count: int, *, place: str) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise DataError(f"{place}: the shard ends {count - len(data)} bytes too early: copy it again")
    return data


def read_mds(source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    """Yield the samples [start, stop) of a shard as documents, named file:sample.

    Raises:
        DataError: the shard is damaged, a column is missing, or it has an encoding that holds no text.
    """
    path = Path(source.name)
    if is_packed(path):
        with open_stream(source, report) as stream:
            yield from _documents(stream, source, config, lambda _count: None)
    else:
        with open(path, "rb", buffering=1 << 20) as stream:
            yield from _documents(stream, source, config, report)


def _documents(stream: IO[bytes], source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    path = source.name
    header = read_mds_header(stream, place=path)
    text_column = _column(header, config.text_field, place=path)
    id_column = None if config.id_field is None else _column(header, config.id_field, place=path, option="--id-field")
    first, stop = source.start or 0, header.num_samples if source.stop is None else source.stop
    if first:
        stream.seek(int(header.offsets[first]))
    else:
        report(int(header.offsets[0]))
    for number in range(first, stop):
        place = f"{path}:{number + 1}"
        size = int(header.offsets[number + 1]) - int(header.offsets[number])
        if size > config.max_document_bytes:
            raise DataError(f"{place}: this sample is longer than {config.max_document_bytes} bytes")
        values = _columns(_exactly(stream, size, place=place), header, place=place)
        report(size)
        text = _text(values[text_column], header.encodings[text_column], config, place=place)
        name = place if id_column is None else _name(values[id_column], header.encodings[id_column], place=place)
        yield Document(name, text)


def _column(header: MdsHeader, name: str, *, place: str, option: str = "--text-field") -> int:
    if name not in header.names:
        raise DataError(missing_field(name, header.names, place=place).replace("--text-field", option))
    return header.names.index(name)


def _columns(sample: bytes, header: MdsHeader, *, place: str) -> list[bytes]:
    variable = sum(size is None for size in header.sizes)
    lengths = iter(np.frombuffer(sample[: 4 * variable], dtype="<u4").tolist() if len(sample) >= 4 * variable else [])
    at = 4 * variable
    values: list[bytes] = []
    for fixed in header.sizes:
        size = next(lengths, len(sample)) if fixed is None else fixed
        values.append(sample[at : at + size])
        at += size
    if at != len(sample):
        raise DataError(f"{place}: the sizes of its columns sum to {at} bytes of {len(sample)}: the shard is damaged")
    return values


def _text(value: bytes, encoding: str, config: CorpusConfig, *, place: str) -> str:
    kind = encoding.partition(":")[0]
    if kind == "ndarray":
        return token_decoder(config, place=place).text(_array(value, encoding, place=place), place=place)
    if kind == "bytes" and config.input_tokenizer is not None:
        return token_decoder(config, place=place).text(_elements(value, _FOUNDRY_IDS, place=place), place=place)
    text = (
        _json(value, place=place) if kind == "json" else _utf8(value, place=place) if kind in ("str", "bytes") else None
    )
    if not isinstance(text, str):
        raise DataError(
            f"{place}: the column {config.text_field!r} (encoding {encoding!r}) holds no text. Choose one of encoding "
            "str, bytes, json or ndarray with --text-field"
        )
    return text


def _name(value: bytes, encoding: str, *, place: str) -> str:
    if encoding in ("str", "str_int"):
        return _utf8(value, place=place)
    if encoding in _SCALARS:
        return str(_elements(value, _SCALARS[encoding], place=place)[0])
    if encoding == "json":
        return str(_json(value, place=place))
    raise DataError(f"{place}: a column of encoding {encoding!r} names no document; choose another with --id-field")


def _utf8(value: bytes, *, place: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8: byte 0x{value[error.start]:02x} at offset {error.start} of the text ({error.reason}). "
            "If this column holds token ids, name their tokenizer with --input-tokenizer"
        ) from None


def _json(value: bytes, *, place: str) -> Any:
    try:
        found = json.loads(value)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None
    return found


def _array(value: bytes, encoding: str, *, place: str) -> npt.NDArray[Any]:
    """Ids of an `ndarray[:dtype[:shape]]` value; axes do not matter, the elements come in order."""
    _, _, rest = encoding.partition(":")
    dtype_name, _, shape = rest.partition(":")
    element: str | None
    at = 0
    if dtype_name:
        element = _ELEMENT_NAMES.get(dtype_name)
    else:
        element, at = _ELEMENTS.get(value[0]) if value else None, 1
    if element is None:
        raise DataError(f"{place}: an array of encoding {encoding!r} holds no token ids (integers are needed)")
    if not shape:
        # One byte: axes << 2 | log2 of the width of the lengths that follow.
        marks = value[at] if len(value) > at else 0
        at += 1 + (marks >> 2) * (1 << (marks & 3))
    return _elements(value[at:], element, place=place)


def _elements(value: bytes, dtype: str, *, place: str) -> npt.NDArray[Any]:
    if len(value) % np.dtype(dtype).itemsize or not value:
        raise DataError(f"{place}: {len(value)} bytes are no array of {np.dtype(dtype).name}: the shard is damaged")
    return np.frombuffer(value, dtype=dtype)
