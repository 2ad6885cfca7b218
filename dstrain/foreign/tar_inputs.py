"""Which tars are meant: one folder searched deeply, or files. Local only; commands and URLs are refused by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dstrain.base.errors import DataError
from dstrain.data.block_index import INDEX_NAME


def find_tars(inputs: Sequence[str | Path]) -> tuple[Path, list[Path]]:
    """The folder all shards lie under, and the shards, sorted.

    Args:
        inputs: one folder (searched for `*.tar`, deeply, leaving out dstrain's own shards), or tars.

    Raises:
        DataError: there is none, or an input is a URL or a command.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found += [tar for tar in path.rglob("*.tar") if _is_meant(tar, path)]
        elif path.is_file():
            found.append(path)
        elif "://" in str(text) or str(text).startswith("pipe:"):
            raise DataError(
                f"{text}: only local files are indexed; commands and URLs are refused. Copy the shards first"
            )
        else:
            raise DataError(f"{text}: no such file or folder")
    shards = sorted({Path(os.path.abspath(path)) for path in found})
    if not shards:
        raise DataError(
            f"{', '.join(map(str, inputs)) or 'no input'}: no *.tar found. Compressed tars must be "
            "unpacked; shards of dstrain's own need no index"
        )
    if len(inputs) == 1 and Path(inputs[0]).is_dir():
        return Path(os.path.abspath(inputs[0])), shards
    return Path(os.path.commonpath([str(shard.parent) for shard in shards])), shards


def _is_meant(tar: Path, root: Path) -> bool:
    """Not in a hidden folder, nor among shards that dstrain wrote into the same folder."""
    if any(part.startswith(".") for part in tar.relative_to(root).parts):
        return False
    return not (tar.parent / INDEX_NAME).exists()
