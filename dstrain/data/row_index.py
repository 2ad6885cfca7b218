"""Rows per block for one (sequence length, packer version): computed once, kept beside the shards where that is allowed.

The file `rows-S1024.v1.idx` is a cache: a missing, foreign or unwritable one is computed again, never trusted blindly.
Layout: 8 bytes magic, 32 bytes SHA-256 of what it depends on and of the rest, then little-endian uint32 rows per block.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import StorageError
from dstrain.base.logs import get_logger
from dstrain.base.progress import track
from dstrain.base.storage import write_bytes
from dstrain.data.packing import PACKER_VERSION, pack

_MAGIC = b"DSROWS1\0"
_LOG = get_logger(__name__)


class BlockEnds(Protocol):
    """What the index needs of a dataset."""

    @property
    def notes_folder(self) -> Path | None:
        """Where small files about the dataset may be kept, if anywhere."""
        ...

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends of a block."""
        ...


def rows_per_block(
    dataset: BlockEnds, *, num_blocks: int, fingerprint: str, sequence_length: int, frame_length: int, may_write: bool
) -> npt.NDArray[np.int64]:
    """Rows of each block when packed to `sequence_length`.

    Args:
        dataset: where the document ends are read.
        num_blocks: blocks of the dataset.
        fingerprint: the dataset's; a cache of another one is ignored.
        sequence_length: tokens of a row.
        frame_length: special tokens added to each piece.
        may_write: keep the result beside the shards (one rank only).
    """
    folder = dataset.notes_folder
    path = folder / f"rows-S{sequence_length}.v{PACKER_VERSION}.idx" if folder is not None else None
    key = f"{fingerprint}|{sequence_length}|{frame_length}|{PACKER_VERSION}|".encode()
    cached = _read(path, key, num_blocks) if path is not None else None
    if cached is not None:
        return cached
    blocks = track(
        range(num_blocks), total=num_blocks, description="packing index", unit="block", quiet=num_blocks < 2000
    )
    counts = [
        pack(dataset.ends(block), sequence_length=sequence_length, frame_length=frame_length).num_rows
        for block in blocks
    ]
    rows = np.array(counts, dtype=np.int64)
    if may_write and path is not None:
        try:
            body = rows.astype("<u4").tobytes()
            write_bytes(path, _MAGIC + hashlib.sha256(key + body).digest() + body)
        except StorageError as error:
            _LOG.info("row index not kept (%s): it is computed at every start", error)
    return rows


def _read(path: Path, key: bytes, num_blocks: int) -> npt.NDArray[np.int64] | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + hashlib.sha256().digest_size
    body = data[head:]
    if len(body) != 4 * num_blocks or data[:head] != _MAGIC + hashlib.sha256(key + body).digest():
        return None
    return np.frombuffer(body, dtype="<u4").astype(np.int64)
