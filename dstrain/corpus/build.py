"""Build shards from text: read, filter, drop duplicates, shuffle globally, hold some out, tokenise, write, publish.

The output is a function of the texts, the tokenizer and the settings alone: byte-identical for any order of the inputs,
any number of processes, any executor, and after any kill. Tasks work in a scratch folder beside the output, which is
published with one rename; a rerun does only what is missing. Memory stays bounded by one bucket of text a process.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError, DstrainError, RunInUseError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.progress import track
from dstrain.base.storage import free_bytes, make_directory, read_json
from dstrain.corpus.build_config import (
    TRAIN,
    VALIDATION,
    BuildReport,
    ShardBuildConfig,
    build_request,
    content_key,
    dataset_identity,
    request_differences,
)
from dstrain.corpus.build_finish import finish_build
from dstrain.corpus.build_plan import (
    Sizes,
    estimate_sizes,
    map_tasks,
    num_groups,
    reduce_plan,
    reduce_tasks,
    scan_tasks,
)
from dstrain.corpus.build_tasks import Job, Task
from dstrain.corpus.card import STATS_NAME, CardCounts
from dstrain.corpus.documents import Source, find_sources, source_sha256
from dstrain.corpus.executors import ArrayShare, Executor, InProcess, SpawnPool
from dstrain.corpus.work_folder import WorkFolder
from dstrain.data.manifest import MANIFEST_NAME
from dstrain.data.reader import ShardDataset
from dstrain.data.tokenizer import Tokenizer
from dstrain.health.lease import RunLease

__all__ = [
    "BuildForecast",
    "BuildReport",
    "ShardBuildConfig",
    "build_shards",
    "build_share",
    "dataset_identity",
    "forecast_build",
]

_QUICK_BYTES = 256 << 20  # hashed in well under a second: not worth a bar
_SCRATCH_SHARE = (
    0.5  # of the estimate: text may be packed better or worse than thought, so only a clear want stops a build
)
_LOG = get_logger(__name__)


@dataclass(frozen=True)
class BuildForecast:
    """What a build would do; numbers of tasks and shards are estimates until the inputs are read."""

    sources: list[Source]
    sizes: Sizes
    map_tasks: int
    reduce_tasks: int
    shards: int
    scratch_bytes: int
    """Space that text in buckets and shards take together beside the output, at their largest."""
    free_bytes: int


@dataclass(frozen=True)
class _Phases:
    """Everything up to the finish."""

    request: dict[str, Any]
    maps: list[Task]
    reduces: list[Task]


def build_shards(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    out: Path,
    config: ShardBuildConfig | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    executor: Executor | None = None,
) -> BuildReport:
    """Build `out` with `train/`, `validation/` and `tokenizer/`, or return it if it is that already.

    Args:
        inputs: files, patterns and `hf:` names, as `corpus.find_sources` takes them.
        tokenizer: the tokenizer's folder.
        out: the folder to publish.
        config: settings, defaults if None.
        overwrite: replace an output made from something else.
        quiet: no progress bars.
        executor: who runs the tasks; None chooses by `config.workers`.

    Raises:
        DataError: an input or the tokenizer is bad, there is no text, or `out` holds something else.
        StorageError: the disk is full or failing.
        RunInUseError: another process builds `out`.
    """
    started = time.monotonic()
    config = config or ShardBuildConfig()
    executor = executor or default_executor(config)
    out, sources, job = _prepare(inputs, tokenizer, out, config)
    if not overwrite and (found := _existing(job, out, sources, started=started, quiet=quiet)) is not None:
        return found
    _check_space(job, out, sources)
    job.work.create()
    with _Lease(job.work, out):
        try:
            job.work.sweep(_named_data(job.work))
            with executor:
                phases = _run_maps(job, sources, executor, quiet=quiet)
                executor.run(job, phases.reduces, quiet=quiet)
            report = _finish(job, out, phases, started)
        except BaseException:
            if not _has_results(job.work):
                job.work.remove()
            raise
    job.work.remove()
    return report


def build_share(
    inputs: Sequence[str],
    *,
    share: ArrayShare,
    tokenizer: Path,
    out: Path,
    config: ShardBuildConfig | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> BuildReport | None:
    """Do one share of a build whose other shares run elsewhere on the same file system; the last one publishes.

    Args as for `build_shards`, and:
        share: which one of how many.

    Returns:
        The report if this share published the output or found it complete; None if another one is publishing it.

    Raises:
        DstrainError: as `build_shards`, or tasks that others had claimed were not finished in time.
    """
    started = time.monotonic()
    config = config or ShardBuildConfig()
    out, sources, job = _prepare(inputs, tokenizer, out, config)
    found = _existing(job, out, sources, started=started, quiet=quiet, may_replace=overwrite)
    if found is not None:
        return found
    _check_space(job, out, sources)
    try:
        return _run_share(job, out, sources, share, started=started, may_replace=overwrite, quiet=quiet)
    except DstrainError:
        # A faster job may have published and cleared up meanwhile, under this one's feet.
        found = _existing(job, out, sources, started=started, quiet=True, may_replace=True)
        if found is None:
            raise
        if not _has_results(job.work):
            job.work.remove()
        return found


def _run_share(
    job: Job, out: Path, sources: Sequence[Source], share: ArrayShare, *, started: float, may_replace: bool, quiet: bool
) -> BuildReport | None:
    job.work.create()
    with share:
        phases = _run_maps(job, sources, share, quiet=quiet)
        share.run(job, phases.reduces, quiet=quiet)
    try:
        with _Lease(job.work, out):
            found = _existing(job, out, sources, started=started, quiet=True, may_replace=may_replace)
            report = found or _finish(job, out, phases, started)
    except RunInUseError:
        _LOG.info("share %d of %d: another one publishes %s", share.index, share.count, out)
        return None
    job.work.remove()
    return report


def forecast_build(inputs: Sequence[str], *, tokenizer: Path, out: Path, config: ShardBuildConfig) -> BuildForecast:
    """What `build_shards` would do; writes nothing.

    Raises:
        DataError: an input or the tokenizer is missing, or `out` holds something else.
    """
    out, sources, _ = _prepare(inputs, tokenizer, out, config)
    sizes = estimate_sizes(sources)
    text = sizes.text_bytes if sizes.text_bytes is not None else sizes.stored_bytes
    token_bytes = Tokenizer.load(tokenizer).dtype.itemsize
    groups = num_groups(text, buckets=sizes.buckets, config=config, token_bytes=token_bytes)
    shard_bytes = text // 4 * token_bytes
    return BuildForecast(
        sources=sources,
        sizes=sizes,
        map_tasks=len(sources) if not sizes.stored_bytes else max(1, -(-sizes.stored_bytes // sizes.map_target_bytes)),
        reduce_tasks=groups,
        shards=max(groups, -(-shard_bytes // config.shard_bytes)),
        scratch_bytes=_scratch_bytes(sizes),
        free_bytes=free_bytes(out.parent),
    )


def default_executor(config: ShardBuildConfig) -> Executor:
    """This process for one worker, a pool of spawned ones for more."""
    return InProcess() if config.workers == 1 else SpawnPool(config.workers)


def _prepare(
    inputs: Sequence[str], tokenizer: Path, out: Path, config: ShardBuildConfig
) -> tuple[Path, list[Source], Job]:
    out = Path(os.path.abspath(out))
    sources = find_sources(inputs)
    loaded = Tokenizer.load(tokenizer)
    if out.exists():
        if not out.is_dir():
            raise DataError(f"{out}: is a file; choose another --out")
        if any(out.iterdir()) and not (out / TRAIN / MANIFEST_NAME).exists():
            raise DataError(f"{out}: exists and holds something that is no dataset; choose another --out or empty it")
    return out, sources, Job(WorkFolder.beside(out), Path(os.path.abspath(tokenizer)), loaded.fingerprint, config)


def _existing(
    job: Job, out: Path, sources: Sequence[Source], *, started: float, quiet: bool, may_replace: bool = False
) -> BuildReport | None:
    if not (out / TRAIN / MANIFEST_NAME).exists():
        return None
    is_quick = sum(source.size_bytes or 0 for source in sources) < _QUICK_BYTES
    files = track(sources, total=len(sources), description="hashing inputs", unit="file", quiet=quiet or is_quick)
    sha256s = {source.name: source_sha256(source) for source in files if source.is_file}
    request = build_request(sources, sha256s, Tokenizer.load(job.tokenizer_folder), job.config)
    train = ShardDataset(out / TRAIN).manifest
    before = train.provenance.get("request")
    if before == request:
        _LOG.info("%s exists already, built from the same inputs and settings: nothing to do", out)
        return _report(out, counts=dict(train.provenance.get("counts", {})), reused=True, started=started)
    if may_replace:
        return None
    differing = request_differences(before if isinstance(before, dict) else {}, request)
    raise DataError(
        f"{out}: exists already, built from other {', '.join(differing) or 'inputs'}. "
        "Choose another --out, or replace it with --overwrite"
    )


def _run_maps(job: Job, sources: Sequence[Source], executor: Executor, *, quiet: bool) -> _Phases:
    sizes = estimate_sizes(sources)
    scans = scan_tasks(sources, sizes, job.config)
    executor.run(job, scans, quiet=quiet or sizes.stored_bytes < _QUICK_BYTES)
    scanned = {task.payload["source"]["name"]: job.work.result(task.name) for task in scans}
    sha256s = {s.name: scanned[os.path.abspath(s.name)]["sha256"] for s in sources if s.is_file}
    tokenizer = Tokenizer.load(job.tokenizer_folder)
    request = build_request(sources, sha256s, tokenizer, job.config)
    maps = map_tasks(sources, scanned, sizes, job.config)
    executor.run(job, maps, quiet=quiet)
    results = [job.work.result(task.name) for task in maps]
    plan = reduce_plan(maps, results, sizes, config=job.config, token_bytes=tokenizer.dtype.itemsize)
    if plan["documents"] == 0:
        read = sum(result["counts"]["documents_read"] for result in results)
        names = ", ".join(source.name for source in sources[:3])
        raise DataError(f"{names}: the corpus is empty ({read} documents, none with text that passes the filters)")
    plan_name = f"plan-{content_key([request, plan])}"
    job.work.complete(plan_name, plan)
    return _Phases(request, maps, reduce_tasks(plan_name, plan))


def _finish(job: Job, out: Path, phases: _Phases, started: float) -> BuildReport:
    key = content_key(phases.request)
    costs = [job.work.result(task.name)["cost"]["cpu_seconds"] for task in phases.reduces]
    counts = finish_build(job, out, request=phases.request, request_key=key, maps=phases.maps, reduces=phases.reduces)
    return _report(out, counts=counts, reused=False, started=started, encoding_seconds=sum(costs))


class _Lease:
    """One builder, or one finisher, for an output at a time."""

    def __init__(self, work: WorkFolder, out: Path):
        self._lease, self._out = RunLease(work.path), out

    def __enter__(self) -> None:
        try:
            self._lease.__enter__()
        except RunInUseError as error:
            who = str(error).partition(": in use by ")[2].partition("): ")[0]
            raise RunInUseError(f"{self._out}: being built by {who}): wait for it, or choose another --out") from None

    def __exit__(self, *fault: Any) -> None:
        self._lease.__exit__(*fault)


def _named_data(work: WorkFolder) -> list[str]:
    return [str(work.result(name).get("data")) for name in work.done()]


def _has_results(work: WorkFolder) -> bool:
    """Whether any document was worked on that a rerun would not have to work on again."""
    return any(work.result(name).get("documents") for name in work.done() if name.startswith("map-"))


def _scratch_bytes(sizes: Sizes) -> int:
    text = sizes.text_bytes if sizes.text_bytes is not None else sizes.stored_bytes
    return text + text // 2  # buckets hold the text; shards have two bytes for every four or more


def _check_space(job: Job, out: Path, sources: Sequence[Source]) -> None:
    if job.work.done():
        return  # a rerun has most of what it needs already
    make_directory(out.parent)
    needed, free = _scratch_bytes(estimate_sizes(sources)), free_bytes(out.parent)
    if free < needed * _SCRATCH_SHARE:
        raise StorageError(
            f"{out.parent}: {free // 2**20:,} MiB free, and the build needs about {math.ceil(needed / 2**20):,} MiB for text in "
            "buckets and shards. Free some space, or build with --out on a larger disk"
        )


def _report(
    out: Path, *, counts: dict[str, int], reused: bool, started: float, encoding_seconds: float = 0.0
) -> BuildReport:
    validation, card = out / VALIDATION, out / STATS_NAME
    dropped: dict[str, int] = {}
    if card.exists():
        dropped = dict(CardCounts.from_json(read_json(card).get("counts"), place=str(card)).dropped)
    return BuildReport(
        path=out,
        train=ShardDataset(out / TRAIN).manifest,
        validation=ShardDataset(validation).manifest if (validation / MANIFEST_NAME).exists() else None,
        reused=reused,
        counts=counts,
        seconds=time.monotonic() - started,
        dropped=dropped,
        encoding_seconds=encoding_seconds,
    )
