"""Index a set of foreign tars: random access and exact resume for shards that are not rewritten.

Writes one folder with `train/`, `validation/` (manifest and two tables each) and `tokenizer/`, laid out like a folder of
block shards, so that `data.path` takes either. Shards are indexed one by one, in this process or several, finished ones
are kept beside the output until it is published with one rename: the same command goes on after a kill. The result
depends on the tars, the tokenizer and the settings alone. Copies no document.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.progress import bar
from dstrain.base.storage import make_directory
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.completed import CompletedShards
from dstrain.foreign.importers import FoundIndexes, check_shard, find_indexes
from dstrain.foreign.manifest import MANIFEST_NAME, ForeignManifest, read_manifest
from dstrain.foreign.payloads import MemberChoice, detect_choice, parse_choice
from dstrain.foreign.pool import start_pool
from dstrain.foreign.publish import publish_index
from dstrain.foreign.samples import group_samples
from dstrain.foreign.shard_index import SPLITS, ShardIndex, ShardIndexConfig, index_shard
from dstrain.foreign.tar_inputs import find_tars
from dstrain.foreign.tar_walk import TarLimits, walk_tar

INDEXER_VERSION = 1
"""Raised when the same request would give other tables."""
DEFAULT_NAME = "dstrain-index"
_LOG = get_logger(__name__)


class IndexConfig(Config):
    """How foreign tars become a dataset."""

    text_field: str | None = None
    """Member with the document: txt, json:FIELD or an npy extension such as tokens.npy; None finds the only one."""
    block_tokens: int = Field(default=131072, ge=64, le=1 << 24)
    """Tokens at which a block is cut: 128Ki pads rows of up to 2048 by about 1 %; use 1048576 for rows of 8192."""
    validation_fraction: float = Field(default=0.01, ge=0, le=0.5)
    """Share of samples held out by a hash of shard name and key; 0 writes no validation split."""
    skip_missing: bool = False
    """Leave out samples without the member instead of refusing them."""
    limits: TarLimits = TarLimits()
    """Bounds on each tar."""
    workers: int = Field(default=1, ge=1, le=512)
    """Processes; 1 stays in this process and uses threads. Does not change the output."""


@dataclass(frozen=True)
class IndexReport:
    """What an indexing gave."""

    path: Path
    """The folder for `data.path`."""
    train: ForeignManifest
    validation: ForeignManifest | None
    reused: bool
    """The index existed already, made from the same shards and settings."""
    counts: dict[str, int]
    """samples, empty, missing."""
    seconds: float


def index_tars(
    inputs: Sequence[str | Path],
    *,
    tokenizer: Path,
    out: Path | None = None,
    config: IndexConfig | None = None,
    wids: Path | None = None,
    use_other_indexes: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
) -> IndexReport:
    """Index tars into `out`, or return it if it is that already.

    Args:
        inputs: what `find_tars` takes.
        tokenizer: the tokenizer's folder; a copy goes into the index.
        out: the folder to publish; None is `dstrain-index` in the shards' folder.
        config: settings, defaults if None.
        wids: a wids shard list to hold the shards against, besides what lies in their folder.
        use_other_indexes: hold the shards against the indexes of other programs that lie beside them.
        overwrite: replace an index made from something else.
        quiet: no progress bars.

    Raises:
        DataError: a tar is refused, a document cannot be read, another program's index disagrees, or `out` holds
            something else.
        StorageError: `out` cannot be written.
    """
    started = time.monotonic()
    config = config or IndexConfig()
    root, shards = find_tars(inputs)
    out = Path(os.path.abspath(out)) if out is not None else root / DEFAULT_NAME
    _check_target(out)
    loaded = Tokenizer.load(tokenizer)
    choice = parse_choice(config.text_field) if config.text_field else _detect(shards, config.limits)
    request = _request(root, shards, loaded, choice, config)
    if not overwrite and out.exists() and any(out.iterdir()):
        return _existing(out, request, started)
    found = find_indexes(root, shards, wids=wids, search=use_other_indexes)
    for name in found.names:
        _LOG.info("the shards are held against %s", name)
    staging = out.parent / f".indexing-{out.name}"
    _make_writable(staging)
    with _only_one(staging):
        done = CompletedShards(staging / "completed", depends_on={k: v for k, v in request.items() if k != "shards"})
        settings = _shard_settings(config, choice)
        indexes = _index_all(shards, loaded, settings, found, done, workers=config.workers, quiet=quiet)
        _hold_out_one(shards, indexes, loaded, settings, fraction=config.validation_fraction)
        provenance = {"request": request, "counts": _counts(indexes)}
        publish_index(out, staging, root, shards, indexes, loaded, choice, provenance)
    return _report(out, counts=_counts(indexes), reused=False, started=started)


def _detect(shards: Sequence[Path], limits: TarLimits) -> MemberChoice:
    source = shards[0]
    samples = group_samples(walk_tar(source, limits), source=str(source))
    return detect_choice(samples.extensions, source=str(source))


def _shard_settings(config: IndexConfig, choice: MemberChoice) -> ShardIndexConfig:
    return ShardIndexConfig(
        member=choice,
        block_tokens=config.block_tokens,
        held_out_below=int(config.validation_fraction * (1 << 64)),
        skip_missing=config.skip_missing,
        limits=config.limits,
    )


def _request(
    root: Path, shards: Sequence[Path], tokenizer: Tokenizer, choice: MemberChoice, config: IndexConfig
) -> dict[str, Any]:
    """All that decides the output, shards by name, size and time of change."""
    listed = [[shard.relative_to(root).as_posix(), shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards]
    return {
        "indexer_version": INDEXER_VERSION,
        "shards": listed,
        "tokenizer_sha256": tokenizer.fingerprint,
        "settings": {**config.model_dump(mode="json", exclude={"workers"}), "text_field": str(choice)},
    }


def _check_target(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "train" / MANIFEST_NAME).exists())):
        raise DataError(f"{out}: exists and is no index; choose another --out")


def _existing(out: Path, request: dict[str, Any], started: float) -> IndexReport:
    before = read_manifest(out / "train").provenance
    if before.get("request") == request:
        _LOG.info("%s exists already, made from the same shards and settings: nothing to do", out)
        return _report(out, counts=dict(before.get("counts", {})), reused=True, started=started)
    old = before.get("request") or {}
    differing = [key.replace("_sha256", "") for key in request if old.get(key) != request[key]]
    raise DataError(
        f"{out}: exists already, made from other {', '.join(differing)}. Choose another --out, or replace it with "
        "--overwrite"
    )


def _make_writable(staging: Path) -> None:
    try:
        make_directory(staging)
    except StorageError as error:
        raise StorageError(
            f"{error}. The shards' folder need not be writable: name another place with --out"
        ) from error


@contextlib.contextmanager
def _only_one(staging: Path) -> Iterator[None]:
    handle = os.open(staging / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"{staging}: another process is indexing into the same place; wait for it") from None
    finally:
        os.close(handle)


class _Worker:
    """What a spawned process keeps between shards; set once when it starts."""

    tokenizer: Tokenizer
    settings: ShardIndexConfig
    found: FoundIndexes


def _start_worker(folder: Path, settings: ShardIndexConfig, found: FoundIndexes) -> None:
    _Worker.tokenizer, _Worker.settings, _Worker.found = Tokenizer.load(folder), settings, found


def _work(shard: Path) -> ShardIndex:
    return _index_one(shard, _Worker.tokenizer, _Worker.settings, _Worker.found)


def _index_one(
    shard: Path, tokenizer: Tokenizer, settings: ShardIndexConfig, found: FoundIndexes, on_bytes: Any = None
) -> ShardIndex:
    index = index_shard(
        shard,
        tokenizer,
        settings,
        check=lambda members, samples: check_shard(found, shard, members, samples),
        on_bytes=on_bytes,
    )
    found.check_digest(shard)
    return index


def _index_all(
    shards: Sequence[Path],
    tokenizer: Tokenizer,
    settings: ShardIndexConfig,
    found: FoundIndexes,
    done: CompletedShards,
    *,
    workers: int,
    quiet: bool,
) -> list[ShardIndex]:
    kept = {shard: index for shard in shards if (index := done.get(shard)) is not None}
    if kept:
        _LOG.info("%d of %d shards were indexed before the interruption", len(kept), len(shards))
    missing = [shard for shard in shards if shard not in kept]
    total = sum(shard.stat().st_size for shard in missing)
    with bar(total=total, description="indexing", unit="B", quiet=quiet) as progress:
        if workers == 1 or len(missing) < 2:
            for shard in missing:
                kept[shard] = _index_one(shard, tokenizer, settings, found, progress.update)
                done.put(shard, kept[shard])
        else:
            for shard, index in _in_processes(missing, tokenizer, settings, found, workers=workers):
                kept[shard] = index
                done.put(shard, index)
                progress.update(index.bytes)
    return [kept[shard] for shard in shards]


def _in_processes(
    shards: Sequence[Path], tokenizer: Tokenizer, settings: ShardIndexConfig, found: FoundIndexes, *, workers: int
) -> Iterator[tuple[Path, ShardIndex]]:
    pool = start_pool(min(workers, len(shards)), _start_worker, tokenizer.folder, settings, found)
    try:
        waiting: dict[Future[ShardIndex], Path] = {pool.submit(_work, shard): shard for shard in shards}
        for future in as_completed(waiting):
            yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise StorageError(
            "an indexing process was killed, mostly for want of memory: use fewer --workers; finished shards are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _hold_out_one(
    shards: Sequence[Path],
    indexes: list[ShardIndex],
    tokenizer: Tokenizer,
    settings: ShardIndexConfig,
    *,
    fraction: float,
) -> None:
    """A set so small that no hash fell below the threshold still holds out its least sample, if it has two."""
    if not any(len(index.samples[split]) for index in indexes for split in SPLITS):
        raise DataError("no sample gives a token: every document is empty for this tokenizer")
    if not any(len(index.samples["train"]) for index in indexes):
        raise DataError("every sample would be held out; index more data, or set --validation-fraction 0")
    held_out = sum(len(index.samples["validation"]) for index in indexes)
    if fraction == 0 or held_out or sum(len(index.samples["train"]) for index in indexes) < 2:
        return
    number = min(range(len(shards)), key=lambda i: indexes[i].least_hash)
    settings = settings.model_copy(update={"held_out_below": indexes[number].least_hash + 1})
    indexes[number] = index_shard(shards[number], tokenizer, settings)


def _counts(indexes: Sequence[ShardIndex]) -> dict[str, int]:
    return {
        "samples": sum(index.num_samples for index in indexes),
        "empty": sum(index.num_empty for index in indexes),
        "missing": sum(index.num_missing for index in indexes),
    }


def _report(out: Path, *, counts: dict[str, int], reused: bool, started: float) -> IndexReport:
    validation = out / "validation"
    return IndexReport(
        path=out,
        train=read_manifest(out / "train"),
        validation=read_manifest(validation) if (validation / MANIFEST_NAME).exists() else None,
        reused=reused,
        counts=counts,
        seconds=time.monotonic() - started,
    )
