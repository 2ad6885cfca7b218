"""Open a dataset folder as blocks, whichever kind it is: block shards, or an index over foreign tars."""

from __future__ import annotations

from pathlib import Path

from dstrain.base.locations import Location
from dstrain.base.protocols import ShouldLeave, never
from dstrain.base.storage import read_json
from dstrain.data.reader import ShardDataset
from dstrain.data.stores import StorageConfig
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.manifest import KIND, MANIFEST_NAME


def is_foreign(path: Path) -> bool:
    """Whether `path` holds the manifest of an index over foreign tars.

    Raises:
        DataError: the manifest is there and is no JSON.
    """
    manifest = Path(path) / MANIFEST_NAME
    if not manifest.is_file():
        return False
    data = read_json(manifest)
    return isinstance(data, dict) and data.get("kind") == KIND


def open_dataset(
    path: Location, *, workers: int = 0, storage: StorageConfig | None = None, should_leave: ShouldLeave = never
) -> ShardDataset | ForeignDataset:
    """One split as a `data.blocks.BlockDataset`, chosen by its manifest.

    Args:
        path: the split's folder, with manifest.json; or the URL of one made of block shards.
        workers: processes that tokenise ahead where text is tokenised on the fly; 0 uses the calling thread.
        storage: how remote shards are read.
        should_leave: whether a read of a remote shard raises `Interrupted` rather than wait on.

    Raises:
        DataError: there is no dataset, or it is damaged.
    """
    if isinstance(path, Path) and is_foreign(path):
        return ForeignDataset(path, workers=workers)
    return ShardDataset(path, storage=storage, should_leave=should_leave)
