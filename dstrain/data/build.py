"""Build shards from text: read, drop duplicates, shuffle globally, hold some out, tokenise, write, publish.

The output is a function of the texts, the tokenizer and the settings alone: byte-identical for any order of the inputs
and any number of workers. Everything is written to a staging folder beside the output and published with one rename; a
build that was interrupted leaves nothing under the output's name. Memory stays bounded by one bucket of text.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.base.logs import get_logger
from dstrain.base.progress import bar, track
from dstrain.base.storage import file_sha256, make_directory, publish_directory, remove_directory
from dstrain.data.buckets import Buckets, Shuffled, num_buckets
from dstrain.data.corpus import CorpusConfig, Source, find_sources, read_documents
from dstrain.data.encoding import encode_stream
from dstrain.data.manifest import MANIFEST_NAME, Manifest
from dstrain.data.reader import ShardDataset
from dstrain.data.shard_writer import ShardWriter
from dstrain.data.tokenizer import Tokenizer

BUILDER_VERSION = 1
"""Raised when the same request would give other bytes."""
TRAIN, VALIDATION, TOKENIZER = "train", "validation", "tokenizer"
_EXPANSION = 4  # bytes of text a byte of compressed input may give; only sizes the scratch buckets
_QUICK_BYTES = 256 << 20  # hashed in well under a second: not worth a bar
_LOG = get_logger(__name__)


class ShardBuildConfig(Config):
    """How text becomes shards."""

    corpus: CorpusConfig = CorpusConfig()
    """How files become documents."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the global shuffle; what is held out does not depend on it."""
    block_tokens: int = Field(default=131072, ge=64, le=1 << 24)
    """Tokens of a block: 128Ki pads rows of up to 2048 by about 1 %; use 1048576 for rows of 8192."""
    shard_bytes: int = Field(default=512 << 20, ge=4096, le=1 << 36)
    """Size at which a shard is cut, in bytes: 1 T tokens in shards of 512 MB are about 4000 files."""
    validation_fraction: float = Field(default=0.01, ge=0, le=0.5)
    """Share of documents held out by document hash; 0 writes no validation split."""
    deduplicate: bool = True
    """Drop documents whose text equals another's byte for byte."""
    workers: int = Field(default=1, ge=1, le=512)
    """Tokenising processes; 1 stays in this process and uses threads. Does not change the output."""


@dataclass(frozen=True)
class BuildReport:
    """What a build gave."""

    path: Path
    train: Manifest
    validation: Manifest | None
    reused: bool
    """The output existed already, made from the same inputs and settings."""
    counts: dict[str, int]
    """documents_read, empty, duplicates, train_documents, validation_documents."""
    seconds: float
    """Wall time of this call."""


def build_shards(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    out: Path,
    config: ShardBuildConfig | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> BuildReport:
    """Build `out` with `train/`, `validation/` and `tokenizer/`, or return it if it is that already.

    Args:
        inputs: files, patterns and `hf:` names, as `corpus.find_sources` takes them.
        tokenizer: the tokenizer's folder.
        out: the folder to publish.
        config: settings, defaults if None.
        overwrite: replace an output made from something else.
        quiet: no progress bars.

    Raises:
        DataError: an input or the tokenizer is bad, there is no text, or `out` holds something else.
        StorageError: the disk is full or failing.
    """
    started = time.monotonic()
    config = config or ShardBuildConfig()
    out = Path(os.path.abspath(out))
    sources = find_sources(inputs)
    loaded = Tokenizer.load(tokenizer)
    _check_target(out)
    request = _request(sources, loaded, config, quiet=quiet)
    if not overwrite and (out / TRAIN / MANIFEST_NAME).exists():
        return _existing(out, request, started)
    make_directory(out.parent)
    _remove_abandoned(out)
    staging = out.parent / f".staging-{out.name}-{socket.gethostname()}-{os.getpid()}"
    make_directory(staging)
    try:
        counts = _build(sources, loaded, config, staging=staging, request=request, quiet=quiet)
        loaded.copy_to(staging / TOKENIZER)
        if out.exists() and any(out.iterdir()):
            remove_directory(out)
        publish_directory(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _report(out, counts=counts, reused=False, started=started)


def dataset_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest fields that a tokenizer decides."""
    return {
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.name,
        "frame_prefix": list(tokenizer.frame_prefix),
        "frame_suffix": list(tokenizer.frame_suffix),
        "special_ids": list(tokenizer.special_ids),
    }


def _request(
    sources: Sequence[Source], tokenizer: Tokenizer, config: ShardBuildConfig, *, quiet: bool
) -> dict[str, Any]:
    """All that decides the output; equal requests give equal bytes. Inputs count by content, not by place."""
    is_quick = sum(source.size_bytes or 0 for source in sources) < _QUICK_BYTES
    files = track(sources, total=len(sources), description="hashing inputs", unit="file", quiet=quiet or is_quick)
    found = [
        {"name": Path(s.name).name, "bytes": s.size_bytes, "sha256": file_sha256(Path(s.name))}
        if s.is_file
        else {"name": s.name}
        for s in files
    ]
    return {
        "builder_version": BUILDER_VERSION,
        "inputs": sorted(found, key=lambda entry: (str(entry["name"]), str(entry.get("sha256")))),
        "tokenizer_sha256": tokenizer.fingerprint,
        "settings": config.model_dump(mode="json", exclude={"workers"}),
    }


def _check_target(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; choose another --out")
    if any(out.iterdir()) and not (out / TRAIN / MANIFEST_NAME).exists():
        raise DataError(f"{out}: exists and holds something that is no dataset; choose another --out or empty it")


def _existing(out: Path, request: dict[str, Any], started: float) -> BuildReport:
    train = ShardDataset(out / TRAIN).manifest
    before = train.provenance.get("request")
    if before == request:
        _LOG.info("%s exists already, built from the same inputs and settings: nothing to do", out)
        return _report(out, counts=dict(train.provenance.get("counts", {})), reused=True, started=started)
    differing = _differences(before if isinstance(before, dict) else {}, request)
    raise DataError(
        f"{out}: exists already, built from other {', '.join(differing) or 'inputs'}. "
        "Choose another --out, or replace it with --overwrite"
    )


def _differences(before: dict[str, Any], request: dict[str, Any]) -> list[str]:
    names = {"inputs": "inputs", "tokenizer_sha256": "tokenizer", "builder_version": "dstrain version"}
    found = [name for key, name in names.items() if before.get(key) != request[key]]
    old, new = before.get("settings") or {}, request["settings"]
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return found + [f"settings ({', '.join(changed)})"] * bool(changed)


def _remove_abandoned(out: Path) -> None:
    """Clear what a killed build of the same output on this host left; a live one is left alone."""
    prefix = f".staging-{out.name}-{socket.gethostname()}-"
    for folder in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid = folder.name[len(prefix) :]
        if pid.isdigit() and not _is_alive(int(pid)):
            _LOG.info("removing %s, left by a build that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _build(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: ShardBuildConfig,
    *,
    staging: Path,
    request: dict[str, Any],
    quiet: bool,
) -> dict[str, int]:
    buckets, counts = _gather(sources, config, scratch=staging / "scratch", quiet=quiet)
    threshold = _held_out_below(buckets, config.validation_fraction)
    identity = dataset_identity(tokenizer)
    writers = {
        name: ShardWriter(
            staging / name, identity=identity, block_tokens=config.block_tokens, shard_bytes=config.shard_bytes
        )
        for name in (TRAIN, VALIDATION)
    }
    try:
        _fill(writers, buckets, tokenizer, config, threshold=threshold, counts=counts, quiet=quiet)
        counts |= {f"{name}_documents": writer.num_documents for name, writer in writers.items()}
        if writers[TRAIN].num_documents == 0:
            raise DataError("the corpus gives no tokens: every document is empty for this tokenizer")
        for name, writer in writers.items():
            if writer.num_documents:
                writer.finish(provenance={"split": name, "request": request, "counts": counts})
            else:
                shutil.rmtree(staging / name)
    finally:
        for writer in writers.values():
            writer.abandon()
    return counts


def _gather(
    sources: Sequence[Source], config: ShardBuildConfig, *, scratch: Path, quiet: bool
) -> tuple[Buckets, dict[str, int]]:
    sizes = [source.size_bytes for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    buckets = Buckets(scratch, seed=config.seed, count=num_buckets(None if total is None else total * _EXPANSION))
    counts = {"documents_read": 0, "empty": 0, "duplicates": 0}
    with bar(total=total, description="reading text", unit="B", quiet=quiet) as progress:
        for document in read_documents(sources, config.corpus, on_bytes=progress.update):
            counts["documents_read"] += 1
            if document.text.strip():
                buckets.add(document.text)
            else:
                counts["empty"] += 1
    if buckets.num_documents == 0:
        read = counts["documents_read"]
        names = ", ".join(source.name for source in sources[:3])
        raise DataError(f"{names}: the corpus is empty ({read} documents, none with text)")
    return buckets, counts


def _held_out_below(buckets: Buckets, fraction: float) -> int:
    """Documents with a split hash below this are held out: at least one, never all, if two differ."""
    least, greatest = buckets.least_split, buckets.greatest_split
    if fraction == 0 or least is None or greatest is None or least == greatest:
        return 0
    return min(max(int(fraction * (1 << 64)), least + 1), greatest)


def _fill(
    writers: dict[str, ShardWriter],
    buckets: Buckets,
    tokenizer: Tokenizer,
    config: ShardBuildConfig,
    *,
    threshold: int,
    counts: dict[str, int],
    quiet: bool,
) -> None:
    # Texts go to the encoder and their places wait here; both queues keep the order.
    waiting: deque[Shuffled] = deque()
    started, tokens_done = time.monotonic(), 0
    with bar(total=buckets.size_bytes, description="tokenising", unit="B", quiet=quiet) as progress:

        def texts() -> Iterator[str]:
            for document in buckets.drain():
                if document.is_duplicate and config.deduplicate:
                    counts["duplicates"] += 1
                    progress.update(document.size_bytes)
                else:
                    waiting.append(document)
                    yield document.text

        for tokens in encode_stream(texts(), tokenizer, workers=config.workers):
            document = waiting.popleft()
            progress.update(document.size_bytes)
            if len(tokens) == 0:
                counts["empty"] += 1
                continue
            writers[VALIDATION if document.split_hash < threshold else TRAIN].add(tokens)
            tokens_done += len(tokens)
            rate = tokens_done / max(time.monotonic() - started, 1e-9)
            progress.set_postfix_str(f"{rate / 1e6:.2f} Mtok/s", refresh=False)


def _report(out: Path, *, counts: dict[str, int], reused: bool, started: float) -> BuildReport:
    validation = out / VALIDATION
    return BuildReport(
        path=out,
        train=ShardDataset(out / TRAIN).manifest,
        validation=ShardDataset(validation).manifest if (validation / MANIFEST_NAME).exists() else None,
        reused=reused,
        counts=counts,
        seconds=time.monotonic() - started,
    )
