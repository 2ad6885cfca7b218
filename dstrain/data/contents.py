"""Open a dataset's table of contents: manifest and block index, checked, from a folder or a URL, and the store behind them.

Sizes are bounded before anything is read, and nothing of the payload is touched. Parses no block.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.base.locations import Location, RemoteUrl
from dstrain.base.protocols import ShouldLeave, never
from dstrain.base.storage import file_sha256
from dstrain.data.block_index import INDEX_NAME, RECORD, check_records, parse_records, read_index
from dstrain.data.cache import DiskCache, cache_key
from dstrain.data.cached_store import CachedStore
from dstrain.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from dstrain.data.remote_store import RemoteStore
from dstrain.data.stores import ByteStore, LocalStore, StorageConfig

MAX_REMOTE_MANIFEST_BYTES = 64 << 20
"""Some 250,000 shards; parsed JSON takes about ten times its text in memory."""


@dataclass(frozen=True)
class Contents:
    """What a dataset is made of and where its bytes are read."""

    manifest: Manifest
    blocks: npt.NDArray[Any]
    """(num_blocks,) records of `block_index.RECORD`, mapped from disk where there is one."""
    store: ByteStore
    notes: Path | None = None
    """A folder in the node's cache for small files about this dataset."""


def open_contents(location: Location, config: StorageConfig, *, should_leave: ShouldLeave = never) -> Contents:
    """Read and check manifest and index.

    Args:
        location: of the dataset.
        config: how a remote one is read.
        should_leave: of a remote one, now and later: whether to raise `Interrupted` rather than wait on.

    Raises:
        DataError: one is missing, damaged or breaks a bound.
        ConfigError: a package for this store is missing, or the cache is too small.
        StorageError: the store cannot be reached within its deadline.
    """
    contents = _open_local(location) if isinstance(location, Path) else _open_remote(location, config, should_leave)
    manifest = contents.manifest
    sizes = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)
    token_bytes = np.dtype(manifest.dtype).itemsize
    source = f"{location}/{INDEX_NAME}"
    check_records(contents.blocks, shard_bytes=sizes, token_bytes=token_bytes, source=source)
    return contents


def _open_local(folder: Path) -> Contents:
    manifest = read_manifest(folder)
    index = folder / INDEX_NAME
    blocks = read_index(index, num_blocks=manifest.num_blocks)
    if file_sha256(index) != manifest.index_sha256:
        raise DataError(f"{index}: sha256 differs from the manifest. Copy the dataset again, or build it again")
    return Contents(manifest, blocks, LocalStore(folder))


def _open_remote(url: RemoteUrl, config: StorageConfig, should_leave: ShouldLeave) -> Contents:
    origin = RemoteStore(url, config, should_leave=should_leave)
    manifest = _read_manifest(origin)
    cache = None
    if config.cache_dir is not None:
        cache = DiskCache(config.cache_dir, limit_bytes=config.cache_limit_bytes, horizon_bytes=config.prefetch_bytes)
    identities = {shard.name: shard.sha256 for shard in manifest.shards}
    blocks = _read_index(origin, manifest, cache)
    store = CachedStore(origin, config, identities=identities, cache=cache)
    return Contents(manifest, blocks, store, cache.notes(manifest.fingerprint) if cache is not None else None)


def _read_manifest(origin: RemoteStore) -> Manifest:
    try:
        return _try_manifest(origin)
    except DataError:
        return _try_manifest(origin)  # a reply can be wrong in a way only its content shows


def _try_manifest(origin: RemoteStore) -> Manifest:
    source = f"{origin.name}/{MANIFEST_NAME}"
    size = origin.size(MANIFEST_NAME)
    if size > MAX_REMOTE_MANIFEST_BYTES:
        raise DataError(f"{source}: {size} bytes, more than the {MAX_REMOTE_MANIFEST_BYTES} a manifest may have")
    try:
        data = json.loads(origin.read(MANIFEST_NAME, 0, size))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not readable as JSON: {error}") from None
    return parse_manifest(data, source=source)


def _read_index(origin: RemoteStore, manifest: Manifest, cache: DiskCache | None) -> npt.NDArray[Any]:
    """The records; mapped from the node's cache where there is one, so that the ranks of a node share the memory."""
    size = manifest.num_blocks * RECORD.itemsize
    source = f"{origin.name}/{INDEX_NAME}"
    if size == 0:
        return np.zeros(0, dtype=RECORD)
    key = cache_key(manifest.index_sha256, 0, size)
    if cache is not None and (path := cache.path_of(key)) is not None:
        if file_sha256(path) == manifest.index_sha256:
            return np.memmap(path, dtype=RECORD, mode="r")
        cache.drop(key)
    found = origin.size(INDEX_NAME)
    if found != size:
        raise DataError(
            f"{source}: {found} bytes, but {manifest.num_blocks} blocks need {size}. Copy the dataset again"
        )
    data = origin.read(INDEX_NAME, 0, size)
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        data = origin.read_again(INDEX_NAME, 0, size)
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise DataError(f"{source}: sha256 differs from the manifest. Copy the dataset again, or build it again")
    if cache is not None and cache.put(key, data) and (path := cache.path_of(key)) is not None:
        return np.memmap(path, dtype=RECORD, mode="r")
    return parse_records(data, source=source)
