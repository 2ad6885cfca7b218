"""From the `data:` section and the sources' row counts to a plan; and the part of it that a checkpoint pins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.base.seeds import derive
from dstrain.data.config import DataConfig
from dstrain.data.mixture import integer_shares
from dstrain.data.plan import Plan, SkippedRows, choose_lanes
from dstrain.data.source_order import SourceOrder, Tail
from dstrain.data.timeline import Phase, Timeline

Int64 = npt.NDArray[np.int64]

SINGLE_SOURCE = "train"
"""Name of the source when `data.path` names the only one."""


@dataclass(frozen=True)
class PlanSpec:
    """All that decides a plan, with names resolved to numbers. Sources are sorted by name."""

    names: tuple[str, ...]
    rows_per_block: tuple[Int64, ...]
    phases: tuple[Phase, ...]
    lanes: int
    window_rows: int
    tail: Tail
    skip_steps: tuple[tuple[int, int], ...]
    skip_rows: tuple[tuple[str, int, tuple[tuple[int, int], ...]], ...]
    """(source, from_step, (block, row) pairs)."""
    seed: int

    def build(self, *, origin: int = 0, era: int = 0) -> Plan:
        """The plan whose data begins at step `origin`.

        Args:
            origin: optimizer steps done when this data began.
            era: how often a run went on with new data; later eras have orders of their own.

        Raises:
            ConfigError: the settings do not fit the data.
        """
        seed = derive(self.seed, "era", era) if era else self.seed
        orders = [
            SourceOrder(
                rows, seed=seed, source=name, lanes=self.lanes, window_rows=self.window_rows, tail=self.tail
            )
            for name, rows in zip(self.names, self.rows_per_block)
        ]  # fmt: skip
        timeline = Timeline(self.phases, lanes=self.lanes, skip_steps=self.skip_steps, origin=origin)
        return Plan(orders, timeline, seed=seed, skip_rows=[self._skipped(orders, entry) for entry in self.skip_rows])

    def _skipped(
        self, orders: list[SourceOrder], entry: tuple[str, int, tuple[tuple[int, int], ...]]
    ) -> SkippedRows:  # fmt: skip
        source, from_step, pairs = entry
        number = self.names.index(source)
        block, row = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        known = (block >= 0) & (block < len(self.rows_per_block[number]))
        rows = np.where(known, self.rows_per_block[number][np.where(known, block, 0)], 0)
        bad = np.flatnonzero((row < 0) | (row >= rows))
        if len(bad):
            first = bad[0]
            raise ConfigError(f"data.skip_rows: source {source!r} has no block {block[first]} with a row {row[first]}")
        return SkippedRows(number, from_step, orders[number].row_number(block, row))

    def pinned(self, step: int) -> dict[str, Any]:
        """JSON-able facts that decided the data of the first `step` steps; equal facts, equal data."""
        return {
            "seed": self.seed,
            "lanes": self.lanes,
            "window_rows": self.window_rows,
            "tail": self.tail,
            "global_batch": self.phases[0].global_batch,
            "weights": dict(zip(self.names, self.phases[0].shares)),
            "phases": [
                [phase.first_step, phase.global_batch, dict(zip(self.names, phase.shares))]
                for phase in self.phases[1:]
                if phase.first_step < step
            ],
            "skip_steps": [list(window) for window in self.skip_steps if window[0] < step],
            "skip_rows": [[s, f, [list(p) for p in pairs]] for s, f, pairs in self.skip_rows if f < step],
        }


def plan_spec(config: DataConfig, rows_per_block: Mapping[str, Int64], *, global_batch: int, seed: int) -> PlanSpec:
    """Resolve a data section.

    Args:
        config: the data section.
        rows_per_block: (B,) rows of each block, by source.
        global_batch: rows of one step before any phase changes it.
        seed: the run's seed.

    Raises:
        ConfigError: weights, lanes, batches or skipped rows that cannot be.
    """
    names = tuple(sorted(rows_per_block))
    rows = tuple(np.asarray(rows_per_block[name], dtype=np.int64) for name in names)
    empty = [name for name, counts in zip(names, rows) if counts.sum() == 0]
    if empty:
        raise ConfigError(f"data: source {empty[0]!r} has no rows: leave it out, or build its shards from text")
    phases = [Phase(0, global_batch, _shares(_weights(config, rows_per_block), names, "data.sources"))]
    for phase in config.phases:
        before = phases[-1]
        shares = _shares(phase.weights, names, phase.key) if phase.weights is not None else before.shares
        first = phase.from_step
        if first is None:
            assert phase.from_tokens is not None, "a phase has a beginning"
            first = step_of_tokens(phases, phase.from_tokens, sequence_length=config.sequence_length)
        phases.append(Phase(first, phase.global_batch or before.global_batch, shares))
    lanes = choose_lanes([p.global_batch for p in phases], [int(r.sum()) for r in rows], lanes=config.lanes)
    return PlanSpec(
        names=names,
        rows_per_block=rows,
        phases=tuple(phases),
        lanes=lanes,
        window_rows=config.window_rows,
        tail=config.tail,
        skip_steps=tuple(sorted(config.skip_steps)),
        skip_rows=tuple((skip.source, skip.from_step, tuple(skip.rows)) for skip in config.skip_rows),
        seed=seed,
    )


def planned_tokens(phases: Sequence[Phase], step: int, *, sequence_length: int) -> int:
    """Tokens that `step` steps take: their rows times the row length, the same for every run with this plan."""
    rows = 0
    for number, phase in enumerate(phases):
        end = min(step, phases[number + 1].first_step) if number + 1 < len(phases) else step
        rows += max(0, end - phase.first_step) * phase.global_batch
    return rows * sequence_length


def step_of_tokens(phases: Sequence[Phase], tokens: int, *, sequence_length: int) -> int:
    """Steps done when at least so many tokens are; the phases so far go on for ever."""
    last = phases[-1]
    missing = tokens - planned_tokens(phases, last.first_step, sequence_length=sequence_length)
    return last.first_step + max(0, -(-missing // (last.global_batch * sequence_length)))


def _weights(config: DataConfig, rows_per_block: Mapping[str, Int64]) -> dict[str, float]:
    if not config.sources:
        return dict.fromkeys(rows_per_block, 1.0)
    weights = {}
    for source in config.sources:
        rows = int(rows_per_block[source.name].sum())
        weights[source.name] = source.weight if source.weight is not None else (source.epochs or 0.0) * rows
    return weights


def _shares(weights: Mapping[str, float], names: tuple[str, ...], key: str) -> tuple[int, ...]:
    shares = integer_shares(weights, key=key)
    return tuple(shares[name] for name in names)


def check_repeats(config: DataConfig, spec: PlanSpec, *, max_steps: int) -> dict[str, float]:
    """Epochs of each source over the whole run.

    Raises:
        ConfigError: a source would be repeated more often than its `max_epochs`.
    """
    epochs = dict(zip(spec.names, spec.build().epochs(max_steps)))
    for source in config.sources:
        if source.max_epochs is not None and epochs[source.name] > source.max_epochs:
            raise ConfigError(
                f"data.sources {source.name!r}: {max_steps} steps take {epochs[source.name]:.2f} epochs of it, "
                f"max_epochs is {source.max_epochs}: lower its weight or train.max_steps, or add data"
            )
    return epochs
