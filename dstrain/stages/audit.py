"""Whether a run was trained on what it says: its records against each other, its pins against the disk, its ledgers made again.

Nothing is written. Needs no model, engine or GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.base.errors import CheckpointError, DataError
from dstrain.base.progress import bar
from dstrain.base.world import World
from dstrain.data.blocks import BlockDataset
from dstrain.data.inspect import verify_dataset
from dstrain.data.loader import PackedLoader
from dstrain.data.reader import ShardDataset
from dstrain.stages.config import PretrainConfig
from dstrain.stages.coverage import EpochCoverage, measure_coverage
from dstrain.stages.recompute import Recomputed, recompute_all, recompute_sample, sample_steps
from dstrain.stages.record import RunRecord, contradictions, read_record
from dstrain.stages.training_data import TrainingData, open_training_data

_MOST_PROBES = 4096


@dataclass(frozen=True)
class AuditReport:
    """What the audit found; `problems` is empty for a sound run."""

    run: Path
    steps: int
    """Optimizer steps looked at."""
    origin: int
    """Steps done when the present data began; those before were trained on data that is recorded but not on disk."""
    worlds: tuple[tuple[int, int], ...]
    """(first step, ranks) each time the run was started."""
    fingerprints: dict[str, str]
    """Of each source, as found on disk."""
    coverage: tuple[EpochCoverage, ...]
    recomputed: Recomputed
    probed_blocks: int
    """Blocks read to see whether the shards are the ones the index describes."""
    full: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def audit_run(
    config: PretrainConfig, *, until: int | None = None, full: bool = False, threads: int = 1, quiet: bool = False
) -> AuditReport:
    """Audit a pretraining run.

    Args:
        config: of the run, as its folder says.
        until: look at the first so many steps; None takes all that left a trace.
        full: make every step again and hash every shard; else an even sample of the steps and a block of each shard.
        threads: steps made at the same time.
        quiet: no progress bars.

    Raises:
        DstrainError: the folder is no run, or its configuration cannot be read.
    """
    record = read_record(config.run_folder, until=until)
    steps = record.last_step if until is None else min(until, record.last_step)
    notes = [f"checkpoint that is not whole, left out: {text}" for text in record.damaged]
    problems = contradictions(record.points)
    try:
        data = open_training_data(config, World())
        notes += restore_loader(data.loader, record)
    except (DataError, CheckpointError) as error:
        return _stopped(config, record, steps, [*problems, str(error)], notes, full=full)
    damage, probed = _check_disk(data, full=full, quiet=quiet)
    problems += damage
    with bar(total=steps - data.loader.origin, description="rows", unit="step", quiet=quiet) as progress:
        coverage = measure_coverage(data.loader, until=steps, advance=progress.update)
    problems += [
        *_row_problems(data.loader, coverage.epochs),
        *_count_problems(record, data.loader, coverage.rows_of_step),
    ]
    recomputed = _recompute(data.loader, record, steps, full=full, threads=threads, quiet=quiet)
    if recomputed.first_difference is not None:
        problems.append(f"step {recomputed.first_difference}: {recomputed.problem}")
    if not recomputed.compared and recomputed.first_difference is None and steps > data.loader.origin:
        problems.append("no ledger could be compared: events.jsonl and the checkpoints hold none for these steps")
    return AuditReport(
        run=config.run_folder, steps=steps, origin=data.loader.origin, worlds=record.worlds,
        fingerprints={name: d.manifest.fingerprint for name, d in data.datasets.items()},
        coverage=coverage.epochs, recomputed=recomputed, probed_blocks=probed, full=full,
        problems=tuple(problems), notes=tuple(notes),
    )  # fmt: skip


def _stopped(
    config: PretrainConfig, record: RunRecord, steps: int, problems: list[str], notes: list[str], *, full: bool
) -> AuditReport:
    """What can be said when the run's data cannot be rebuilt."""
    return AuditReport(
        run=config.run_folder, steps=steps, origin=0, worlds=record.worlds, fingerprints={}, coverage=(),
        recomputed=Recomputed(0, 0, None), probed_blocks=0, full=full, problems=tuple(problems), notes=tuple(notes),
    )  # fmt: skip


def restore_loader(loader: PackedLoader, record: RunRecord) -> list[str]:
    """Bring a loader to the state the run is known by; what a reader should know about it comes back.

    Raises:
        CheckpointError: the data on disk or the configuration is not what the checkpoint pins, with a diff.
    """
    notes = []
    if record.newest is None:
        notes.append("no checkpoint: the data is not pinned by a fingerprint, only its ledgers can be compared")
    else:
        loader.restore(record.newest.loader, step=record.newest.step)
    for source, block, met in record.closed:
        known = loader.quarantine.closed.get(source, {})
        known[block] = min(met, known.get(block, met))
    if loader.origin:
        notes.append(
            f"steps 1 to {loader.origin} were trained on other data, recorded in the checkpoint's history "
            f"({len(loader.history)} times): their rows cannot be counted or made again"
        )
    return notes


def _check_disk(data: TrainingData, *, full: bool, quiet: bool) -> tuple[list[str], int]:
    """Problems of the shards, and the blocks read: all of them, or one of each shard."""
    problems: list[str] = []
    probed = 0
    for name, dataset in data.datasets.items():
        closed = set(data.loader.quarantine.closed[name])
        folder = getattr(dataset, "path", None)
        if full and not closed and isinstance(dataset, ShardDataset) and isinstance(folder, Path) and folder.is_dir():
            report = verify_dataset(folder)
            problems += [f"source {name!r}: {problem}" for problem in report.problems]
            probed += report.num_blocks
            continue
        blocks = list(range(dataset.manifest.num_blocks)) if full else _one_of_each_shard(dataset)
        blocks = [block for block in blocks if block not in closed]  # known to be damaged, and not trained on
        problems += _unreadable(name, dataset, blocks, quiet=quiet)
        probed += len(blocks)
    return problems, probed


def _unreadable(name: str, dataset: BlockDataset, blocks: Sequence[int], *, quiet: bool) -> list[str]:
    problems = []
    with bar(total=len(blocks), description="shards", unit="block", quiet=quiet or len(blocks) < 64) as progress:
        for block in blocks:
            try:
                dataset.read(block)
            except DataError as error:
                problems.append(f"source {name!r}: {error}")
            progress.update(1)
    return problems


def _one_of_each_shard(dataset: object) -> list[int]:
    """The last block of each shard (what a cut takes first), at most some thousand; no index in memory, no probe."""
    records = getattr(dataset, "blocks", None)
    if not isinstance(records, np.ndarray) or "shard" not in (records.dtype.names or ()):
        return []
    shards = records["shard"][::-1]
    last = len(records) - 1 - np.unique(shards, return_index=True)[1]
    stride = max(1, len(last) // _MOST_PROBES)
    return [int(block) for block in np.sort(last)[::stride]]


def _row_problems(loader: PackedLoader, epochs: Iterable[EpochCoverage]) -> list[str]:
    problems = []
    left_out_on_purpose = bool(loader.spec.skip_rows or loader.spec.skip_steps or loader.quarantine.entries())
    for found in epochs:
        if found.repeated:
            problems.append(f"source {found.source!r}, epoch {found.epoch}: {found.repeated} rows were repeated")
        if found.left_out and not left_out_on_purpose:
            problems.append(
                f"source {found.source!r}, epoch {found.epoch}: {found.left_out} rows were due and not seen"
            )
    return problems


def _count_problems(record: RunRecord, loader: PackedLoader, rows_of_step: np.ndarray) -> list[str]:
    """The first written count of rows that is not the plan's."""
    begun = 0 if loader.origin == 0 else next(
        (p.rows for p in record.points if p.step == loader.origin and p.rows is not None), None
    )  # fmt: skip
    if begun is None:
        return []
    total = begun + np.cumsum(rows_of_step)
    for point in record.points:
        at = point.step - loader.origin - 1
        if point.rows is not None and 0 <= at < len(total) and point.rows != total[at]:
            return [f"step {point.step}: {point.where} says {point.rows} rows, the plan gives {int(total[at])}"]
    return []


def _recompute(
    loader: PackedLoader, record: RunRecord, steps: int, *, full: bool, threads: int, quiet: bool
) -> Recomputed:
    if full:
        with bar(total=steps - loader.origin, description="ledgers", unit="step", quiet=quiet) as progress:
            return recompute_all(loader, record.points, until=steps, threads=threads, advance=progress.update)
    tokens = loader.plan.global_batch(max(steps - 1, loader.origin)) * loader.sources[0].sequence_length
    chosen = sample_steps(record.points, origin=loader.origin, tokens_per_step=tokens)
    with bar(total=len(chosen), description="ledgers", unit="step", quiet=quiet) as progress:
        return recompute_sample(loader, record.points, chosen, threads=threads, advance=progress.update)
