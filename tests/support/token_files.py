"""Write small Megatron, datatrove and MDS files from their documented layouts, for the readers' tests.

The real libraries are not needed here; that these bytes are theirs was checked by hand against datatrove 0.10.1 and
mosaicml-streaming 0.13.0.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, dtype: str = "uint16") -> Path:
    """Write `prefix.bin` and `prefix.idx`; a document is a list of sequences of ids. Returns the .bin."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    width = np.dtype(dtype).itemsize
    data = b"".join(np.array(sequence, dtype=dtype).tobytes() for sequence in sequences)
    offsets = np.cumsum([0, *lengths])[:-1] * width
    marks = np.cumsum([0, *(len(document) for document in documents)])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(sequences), len(marks))
    prefix.with_suffix(".idx").write_bytes(
        head
        + np.array(lengths, dtype="<i4").tobytes()
        + offsets.astype("<i8").tobytes()
        + marks.astype("<i8").tobytes()
    )
    path = prefix.with_suffix(".bin")
    path.write_bytes(data)
    return path


def write_datatrove(
    path: Path, documents: Sequence[Sequence[int]], *, width: int = 2, metadata: str | None = None
) -> Path:
    """Write `path` (.ds) with its .index, and its .metadata if given. Returns `path`."""
    dtype = f"<u{width}"
    path.write_bytes(b"".join(np.array(ids, dtype=dtype).tobytes() for ids in documents))
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.uint64) if documents else np.zeros(0, np.uint64)
    path.with_name(path.name + ".index").write_bytes(ends.astype("<u8").tobytes())
    if metadata is not None:
        path.with_name(path.name + ".metadata").write_text(metadata)
    return path


def mds_shard(columns: Mapping[str, tuple[str, int | None]], samples: Sequence[Mapping[str, bytes]]) -> bytes:
    """One shard; `columns` gives the encoding and fixed size by name, `samples` the encoded values."""
    names = sorted(columns)
    config = json.dumps(
        {
            "column_encodings": [columns[name][0] for name in names],
            "column_names": names,
            "column_sizes": [columns[name][1] for name in names],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": 1 << 26,
            "version": 2,
        },
        sort_keys=True,
    ).encode()
    rows = []
    for sample in samples:
        sizes = [len(sample[name]) for name in names if columns[name][1] is None]
        rows.append(np.array(sizes, dtype="<u4").tobytes() + b"".join(sample[name] for name in names))
    offsets = np.cumsum([0, *map(len, rows)]) + 4 + 4 * (len(rows) + 1) + len(config)
    return struct.pack("<I", len(rows)) + offsets.astype("<u4").tobytes() + config + b"".join(rows)


def write_mds(
    folder: Path,
    columns: Mapping[str, tuple[str, int | None]],
    shards: Sequence[Sequence[Mapping[str, bytes]]],
    *,
    zstd: bool = False,
) -> Path:
    """Write an MDS folder with its index.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for number, samples in enumerate(shards):
        raw = mds_shard(columns, samples)
        name = f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": "zstd" if zstd else None,
            "samples": len(samples),
            "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}},
            "zip_data": None,
        }
        if zstd:
            packed = zstandard.compress(raw)
            (folder / f"{name}.zstd").write_bytes(packed)
            entry["zip_data"] = {"basename": f"{name}.zstd", "bytes": len(packed), "hashes": {}}
        else:
            (folder / name).write_bytes(raw)
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def mds_array(ids: Sequence[int], dtype: str, *, with_dtype: bool = True) -> bytes:
    """An `ndarray` value of one axis, as MDS's NDArray encoding lays it out, its dtype before it or not."""
    code = {"uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}
    width = 0 if len(ids) < 256 else 1
    shape = bytes([(1 << 2) | width]) + np.array([len(ids)], dtype=("<u1", "<u2")[width]).tobytes()
    return (bytes([code[dtype]]) if with_dtype else b"") + shape + np.array(ids, dtype=dtype).tobytes()
