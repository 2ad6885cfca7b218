"""Rewrite foreign tars as block shards: for speed, or to move a set of loose documents into one format.

The tars are indexed in scratch space first, so every check of indexing holds, then each document goes into blocks: in the
set's own order, or shuffled globally by a hash of its tokens, with exact duplicates dropped. The result is a function of
the documents and settings alone. Published with one rename; an interrupted conversion leaves nothing under its name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.base.progress import bar
from dstrain.base.seeds import derive
from dstrain.base.storage import append_scratch, make_directory, publish_directory, remove_directory
from dstrain.data.manifest import MANIFEST_NAME, Manifest
from dstrain.data.shard_writer import ShardWriter
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.index import IndexConfig, index_tars
from dstrain.foreign.shard_index import SPLITS

_HEAD = struct.Struct("<16sI")
_BUCKET_TOKENS = 32 << 20  # a bucket is sorted in memory
_BUFFER_BYTES = 32 << 20


class ConvertConfig(Config):
    """How foreign tars become block shards."""

    index: IndexConfig = IndexConfig()
    """How documents are found, held out and tokenised."""
    shuffle: bool = True
    """Shuffle all documents by a hash of their tokens; false keeps the order of the set."""
    deduplicate: bool = True
    """When shuffling, drop documents whose tokens equal another's."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the shuffle."""
    shard_bytes: int = Field(default=512 << 20, ge=4096, le=1 << 36)
    """Size at which a shard is cut, in bytes."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion gave."""

    path: Path
    train: Manifest
    validation: Manifest | None
    duplicates: int
    """Documents dropped because their tokens equal another's."""
    counts: dict[str, int]
    """Samples, empty and missing ones, as indexing counts them."""
    seconds: float


def convert_foreign(
    inputs: Sequence[str | Path],
    *,
    tokenizer: Path,
    out: Path,
    config: ConvertConfig | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> ConvertReport:
    """Convert tars into `out` with `train/`, `validation/` and `tokenizer/`.

    Args:
        inputs: a folder or tars, as `foreign.tar_inputs.find_tars` takes them.
        tokenizer: the tokenizer's folder.
        out: the folder to publish.
        config: settings, defaults if None.
        overwrite: replace an existing dataset.
        quiet: no progress bars.

    Raises:
        DataError: a tar is refused, a document cannot be read, or `out` exists.
        StorageError: the disk is full or failing.
    """
    started = time.monotonic()
    config = config or ConvertConfig()
    out = Path(os.path.abspath(out))
    _check_target(out, overwrite)
    make_directory(out.parent)
    staging = out.parent / f".converting-{out.name}"
    ready = staging / "ready"
    shutil.rmtree(ready, ignore_errors=True)  # the index beside it may be used again
    make_directory(ready)
    report = index_tars(
        inputs, tokenizer=tokenizer, out=staging / "index", config=config.index, overwrite=False, quiet=quiet
    )
    loaded = Tokenizer.load(tokenizer)
    manifests, duplicates = {}, 0
    for split in SPLITS:
        if (report.path / split).exists():
            manifests[split], dropped = _convert_split(report.path / split, ready, split, loaded, config, quiet=quiet)
            duplicates += dropped
    loaded.copy_to(ready / "tokenizer")
    if out.exists():
        remove_directory(out) if any(out.iterdir()) else out.rmdir()
    publish_directory(ready, out)
    shutil.rmtree(staging, ignore_errors=True)
    return ConvertReport(
        path=out,
        train=manifests["train"],
        validation=manifests.get("validation"),
        duplicates=duplicates,
        counts=report.counts,
        seconds=time.monotonic() - started,
    )


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "train" / MANIFEST_NAME).exists():
        raise DataError(f"{out}: exists and is no dataset; choose another --out")
    if not overwrite:
        raise DataError(f"{out}: exists already. Choose another --out, or replace it with --overwrite")


def _convert_split(
    source: Path, ready: Path, split: str, tokenizer: Tokenizer, config: ConvertConfig, *, quiet: bool
) -> tuple[Manifest, int]:
    dataset = ForeignDataset(source, workers=config.index.workers if config.index.workers > 1 else 0)
    found = dataset.manifest
    identity = {
        name: getattr(found, name)
        for name in ("tokenizer_sha256", "vocab_size", "dtype", "frame_prefix", "frame_suffix", "special_ids")
    }
    writer = ShardWriter(
        ready / split, identity=identity, block_tokens=config.index.block_tokens, shard_bytes=config.shard_bytes
    )
    scratch = ready.parent / f"scratch-{split}"
    shutil.rmtree(scratch, ignore_errors=True)
    duplicates = 0
    try:
        documents = _documents(dataset, quiet=quiet)
        if not config.shuffle:
            for tokens in documents:
                writer.add(tokens)
        else:
            buckets = _TokenBuckets(scratch, seed=config.seed, num_tokens=found.num_tokens, dtype=found.dtype)
            for tokens in documents:
                buckets.add(tokens)
            for tokens, is_duplicate in buckets.drain():
                duplicates += is_duplicate and config.deduplicate
                if not (is_duplicate and config.deduplicate):
                    writer.add(tokens)
        provenance = {"split": split, "converted": found.fingerprint, "settings": config.model_dump(mode="json")}
        return writer.finish(provenance=provenance), duplicates
    finally:
        writer.abandon()
        dataset.close()


def _documents(dataset: ForeignDataset, *, quiet: bool) -> Iterator[npt.NDArray[Any]]:
    total = len(dataset.blocks)
    with bar(total=dataset.manifest.num_tokens, description="converting", unit="tok", quiet=quiet) as progress:
        for number in range(total):
            dataset.will_need(range(number, min(total, number + 64)))
            block = dataset.read(number)
            first = 0
            for end in block.ends.tolist():
                yield block.tokens[first:end]
                first = end
            progress.update(len(block.tokens))


class _TokenBuckets:
    """Global shuffle on disk: documents go to buckets by a keyed hash of their tokens, each bucket is sorted."""

    def __init__(self, folder: Path, *, seed: int, num_tokens: int, dtype: str) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._key = derive(seed, "converted documents").to_bytes(8, "little")
        self._buffers = [bytearray() for _ in range(max(1, min(4096, -(-num_tokens // _BUCKET_TOKENS))))]
        self._buffered = 0
        make_directory(folder)

    def add(self, tokens: npt.NDArray[Any]) -> None:
        data = tokens.tobytes()
        place = hashlib.blake2b(data, digest_size=16, key=self._key).digest()
        buffer = self._buffers[int.from_bytes(place[:8], "big") * len(self._buffers) >> 64]
        buffer += _HEAD.pack(place, len(data))
        buffer += data
        self._buffered += _HEAD.size + len(data)
        if self._buffered > _BUFFER_BYTES:
            self._flush()

    def drain(self) -> Iterator[tuple[npt.NDArray[Any], bool]]:
        """Every document in hash order, and whether it equals the one before it."""
        self._flush()
        for number in range(len(self._buffers)):
            path = self._folder / f"{number:04d}"
            if path.exists():
                yield from self._sorted(path.read_bytes())
                path.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _sorted(self, data: bytes) -> Iterator[tuple[npt.NDArray[Any], bool]]:
        places, at = [], 0
        while at < len(data):
            place, length = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            places.append((place, at, length))
            at += length
        places.sort()
        previous = b""
        for place, start, length in places:
            yield (
                np.frombuffer(data, dtype=self._dtype, count=length // self._dtype.itemsize, offset=start),
                (place == previous),
            )
            previous = place

    def _flush(self) -> None:
        for number, buffer in enumerate(self._buffers):
            if buffer:
                append_scratch(self._folder / f"{number:04d}", buffer)
                self._buffers[number] = bytearray()
        self._buffered = 0
