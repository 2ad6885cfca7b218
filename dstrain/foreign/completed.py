"""Shards that an unfinished indexing has done already: one small file each, found again by what it depends on.

A file is written whole or not at all and carries a checksum, so it is its own completion marker. Its name is a hash of
the shard (path, size, time of change) and of the settings: another setting finds nothing here and starts afresh.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.base.storage import make_directory, write_bytes
from dstrain.foreign.manifest import BLOCK, SAMPLE
from dstrain.foreign.shard_index import SPLITS, ShardIndex

_MAGIC = b"DSFOREIGN1\n"
_COUNTS = ("bytes", "num_samples", "num_empty", "num_missing", "least_hash")


class CompletedShards:
    """A folder of finished shard indexes."""

    def __init__(self, folder: Path, *, depends_on: dict[str, Any]) -> None:
        """Open or create the folder.

        Args:
            folder: private to one indexing.
            depends_on: JSON-able; all that decides the result beside the shard itself.
        """
        make_directory(folder)
        self._folder = folder
        self._depends_on = json.dumps(depends_on, sort_keys=True)

    def get(self, shard: Path) -> ShardIndex | None:
        """What was kept for this shard, if the shard has not changed since and the file is whole."""
        try:
            data = self._path(shard).read_bytes()
        except OSError:
            return None
        body = data[: -hashlib.sha256().digest_size]
        if not body.startswith(_MAGIC) or hashlib.sha256(body).digest() != data[len(body) :]:
            return None
        return _unpack(body[len(_MAGIC) :])

    def put(self, shard: Path, index: ShardIndex) -> None:
        """Keep a result.

        Raises:
            StorageError: the disk is full or failing.
        """
        body = _MAGIC + _pack(index)
        write_bytes(self._path(shard), body + hashlib.sha256(body).digest())

    def _path(self, shard: Path) -> Path:
        found = shard.stat()
        key = f"{shard}|{found.st_size}|{found.st_mtime_ns}|{self._depends_on}"
        return self._folder / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _pack(index: ShardIndex) -> bytes:
    head = {name: getattr(index, name) for name in _COUNTS}
    head |= {"sha256": index.sha256, "samples": [len(index.samples[s]) for s in SPLITS]}
    head |= {"blocks": [len(index.blocks[s]) for s in SPLITS]}
    tables = [index.samples[s].tobytes() for s in SPLITS] + [index.blocks[s].tobytes() for s in SPLITS]
    return json.dumps(head).encode() + b"\n" + b"".join(tables)


def _unpack(data: bytes) -> ShardIndex:
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    index = ShardIndex(sha256=head["sha256"], **{name: head[name] for name in _COUNTS})
    at = 0
    for tables, dtype, counts in ((index.samples, SAMPLE, head["samples"]), (index.blocks, BLOCK, head["blocks"])):
        for split, count in zip(SPLITS, counts):
            tables[split] = np.frombuffer(rest, dtype=dtype, count=count, offset=at)
            at += count * dtype.itemsize
    return index
