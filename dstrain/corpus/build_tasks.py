"""The three kinds of build tasks: scan an input, map some parts into hash buckets, reduce some buckets to shards.

Each is a function of plain data and the files it reads: it runs in any process on any node that sees them, in any order,
and its result has no trace of where. Results are named by what decides them (see `work_folder`). Knows nothing of who
runs tasks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dstrain.base.errors import DataError, RunInUseError
from dstrain.base.storage import make_directory
from dstrain.corpus.buckets import BucketWriter, PartFile, Shuffled, read_bucket
from dstrain.corpus.build_config import TRAIN, VALIDATION, ShardBuildConfig, dataset_identity
from dstrain.corpus.card import CardCounts
from dstrain.corpus.documents import read_documents, source_sha256
from dstrain.corpus.encoding import encode_stream
from dstrain.corpus.filters import Filters
from dstrain.corpus.sources import Source
from dstrain.corpus.splitting import split_source
from dstrain.corpus.work_folder import WorkFolder, remove_quietly
from dstrain.data.shard_writer import ShardWriter
from dstrain.data.tokenizer import Tokenizer

Kind = Literal["scan", "map", "reduce"]
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What all tasks of a build share."""

    work: WorkFolder
    tokenizer_folder: Path
    tokenizer_sha256: str
    config: ShardBuildConfig
    is_shared: bool = False
    """Other jobs work on the same tasks: a task is claimed before it is run."""


@dataclass(frozen=True)
class Task:
    """One piece of work; pickles."""

    kind: Kind
    name: str
    """Of its marker: a hash of all that decides the result."""
    weight: int
    """Bytes of input, for progress."""
    payload: dict[str, Any]


def run_task(job: Job, task: Task, report: OnBytes | None = None) -> dict[str, Any] | None:
    """Do a task unless it is done, and return what its marker says; None where another job is at it.

    Args:
        job: the build it belongs to.
        task: what to do.
        report: called with bytes of the task's weight done since the last call.

    Raises:
        DataError: an input is bad; the message names file and line.
        StorageError: the disk is full or failing.
    """
    claim = job.work.claim(task.name) if job.is_shared else contextlib.nullcontext()
    try:
        with claim:
            if task.name in job.work:
                return job.work.result(task.name)
            started, cpu = time.monotonic(), time.process_time()
            result = _RUNNERS[task.kind](job, task, report or (lambda _count: None))
            result["kind"] = task.kind
            result["cost"] = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
            job.work.complete(task.name, result)
            return result
    except RunInUseError:
        return None


def file_state(name: str) -> list[list[int]]:
    """Size and time of a file and of the index that may lie beside it: a cheap sign of a change."""
    path = Path(name)
    found = []
    for place in (path, path.with_suffix(".idx"), Path(f"{name}.index")):
        try:
            status = os.stat(place)
        except OSError:
            continue
        found.append([status.st_size, status.st_mtime_ns])
    return found


def _scan(job: Job, task: Task, report: OnBytes) -> dict[str, Any]:
    source = Source(**task.payload["source"])
    _check_unchanged(source.name, task.payload["state"])
    parts = split_source(source, job.config.corpus, target_bytes=task.payload["target_bytes"])
    digest = source_sha256(source)
    _check_unchanged(source.name, task.payload["state"])
    report(task.weight)
    return {
        "sha256": digest,
        "state": task.payload["state"],
        "parts": [dataclasses.asdict(part) for part in parts],
    }


def _map(job: Job, task: Task, report: OnBytes) -> dict[str, Any]:
    filters = Filters(job.config.filters)
    counts = CardCounts()
    writer = BucketWriter(job.work.new_data("map"), seed=job.config.seed, count=task.payload["buckets"])
    try:
        for entry in task.payload["parts"]:
            source = Source(**entry["source"])
            _check_unchanged(source.name, entry["state"])
            for document in read_documents([source], job.config.corpus, on_bytes=report):
                counts.read(source, size_bytes=len(document.text.encode("utf-8")))
                kept, reason = filters.apply(document)
                if not kept.text.strip():
                    reason = "empty"
                if reason is None:
                    writer.add(kept.text.encode("utf-8"))
                else:
                    counts.drop(reason)
            _check_unchanged(source.name, entry["state"])
        part = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return {
        "data": part.path.name,
        "part": {"size_bytes": part.size_bytes, "table": part.table, "flushes": part.flushes},
        "documents": writer.num_documents,
        "text_bytes": writer.size_bytes,
        "splits": [writer.least_split, writer.greatest_split],
        "counts": counts.to_json(),
    }


def _reduce(job: Job, task: Task, report: OnBytes) -> dict[str, Any]:
    group, plan = task.payload["group"], job.work.result(task.payload["plan"])
    key_prefix = f"{group:05d}-" if plan["groups"] > 1 else ""
    folder = job.work.new_data("reduce")
    make_directory(folder)
    config, tokenizer = job.config, _tokenizer(job.tokenizer_folder, job.tokenizer_sha256)
    writers = {
        name: ShardWriter(
            folder / name,
            identity=dataset_identity(tokenizer),
            block_tokens=config.block_tokens,
            shard_bytes=config.shard_bytes,
            compression=config.compression,
            key_prefix=key_prefix,
        )
        for name in (TRAIN, VALIDATION)
    }
    try:
        counts = _fill(writers, _group_texts(job, plan, group), tokenizer, plan, config=config, report=report)
        for writer in writers.values():
            writer.finish(provenance={})
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        remove_quietly(folder)
        raise
    tokens = sum(writer.num_tokens for writer in writers.values())
    return {"data": folder.name, "tokens": tokens, "counts": counts.to_json()}


def _group_texts(job: Job, plan: dict[str, Any], group: int) -> Iterator[Shuffled]:
    parts = []
    for name in plan["maps"]:
        result = job.work.result(name)
        parts.append(PartFile(job.work.data(result["data"]), **result["part"]))
    buckets, groups = plan["buckets"], plan["groups"]
    for bucket in range(buckets * group // groups, buckets * (group + 1) // groups):
        yield from read_bucket(parts, bucket, count=buckets)


def _fill(
    writers: dict[str, ShardWriter],
    shuffled: Iterator[Shuffled],
    tokenizer: Tokenizer,
    plan: dict[str, Any],
    *,
    config: ShardBuildConfig,
    report: OnBytes,
) -> CardCounts:
    counts = CardCounts()
    # Texts go to the encoder and their places wait here; both queues keep the order.
    waiting: deque[Shuffled] = deque()

    def texts() -> Iterator[str]:
        for document in shuffled:
            counts.group(document.copies, dropped=config.deduplicate)
            if config.deduplicate:
                report((document.copies - 1) * document.size_bytes)
            for _ in range(1 if config.deduplicate else document.copies):
                waiting.append(document)
                yield document.text

    for tokens in encode_stream(texts(), tokenizer):
        document = waiting.popleft()
        report(document.size_bytes)
        if len(tokens) == 0:
            counts.drop("empty")
            continue
        split = VALIDATION if document.split_hash < plan["held_out_below"] else TRAIN
        writers[split].add(tokens)
        counts.keep(split, tokens=len(tokens), characters=len(document.text), size_bytes=document.size_bytes)
    return counts


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: Path, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != sha256:
        raise DataError(f"{folder}: the tokenizer changed while shards were built with it: build again")
    return tokenizer


def _check_unchanged(name: str, state: list[list[int]]) -> None:
    if file_state(name) != state:
        raise DataError(f"{name}: changed while it was read: build again once nothing writes to it")


_RUNNERS: dict[Kind, Callable[[Job, Task, OnBytes], dict[str, Any]]] = {"scan": _scan, "map": _map, "reduce": _reduce}
