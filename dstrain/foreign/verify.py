"""Check an index and the tars behind it, and list every problem instead of stopping at the first.

The tables are checked against the manifest, each tar against its size and SHA-256, and where that differs each block
against its checksum, so that the report says what is damaged. Text is not tokenised. Repairs nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.base.errors import DataError, DstrainError
from dstrain.base.progress import bar
from dstrain.base.storage import file_sha256
from dstrain.data.inspect import VerifyReport, find_datasets
from dstrain.foreign.block_reader import BlockReader
from dstrain.foreign.open import is_foreign


def is_index(path: Path) -> bool:
    """Whether `path` is an index over foreign tars, or one split of it."""
    return any(is_foreign(folder) for folder in (Path(path), Path(path) / "train", Path(path) / "validation"))


def verify_index(path: Path, *, quiet: bool = False) -> VerifyReport:
    """Read all tars of an index, or of one of its splits.

    Raises:
        DataError: there is no index at `path`.
    """
    folders = find_datasets(path)
    problems: list[str] = []
    readers: list[BlockReader] = []
    for folder in folders:
        try:
            readers.append(BlockReader(folder, check_shards=False))
            readers[-1].tokenizer()
        except DataError as error:
            problems.append(str(error))
    digests: dict[Path, str] = {}  # both splits lie in the same tars
    sizes = {reader.root / shard.name: shard.bytes for reader in readers for shard in reader.manifest.shards}
    with bar(total=sum(sizes.values()), description="verifying", unit="B", quiet=quiet) as progress:
        for reader in readers:
            problems += _verify(reader, digests, progress)
    return VerifyReport(
        checked=tuple(folders),
        num_shards=len(sizes),
        num_blocks=sum(reader.manifest.num_blocks for reader in readers),
        num_bytes=sum(sizes.values()),
        problems=tuple(dict.fromkeys(problems)),
    )


def _verify(reader: BlockReader, digests: dict[Path, str], progress: Any) -> Iterator[str]:
    for number, shard in enumerate(reader.manifest.shards):
        path = reader.root / shard.name
        if path not in digests:
            try:
                digests[path] = file_sha256(path)
            except OSError as error:
                digests[path] = ""
                yield f"{path}: cannot be read: {error.strerror}"
            progress.update(shard.bytes)
        if digests[path] in (shard.sha256, ""):
            continue
        yield f"{path}: sha256 is not that of the shard that was indexed"
        for block in np.flatnonzero(reader.blocks["shard"] == number).tolist():
            try:
                reader.check(block)
            except DstrainError as error:
                yield str(error)
