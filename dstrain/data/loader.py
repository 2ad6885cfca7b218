"""Rows of the plan as packed, corrupted micro-batches: a pure function of (seed, step, rank, world).

Joins plan, sources, packing and the objective's corruption (passed in as a function: this room knows no masks). State is a
handful of integers and fingerprints. Making steps ahead is `data.prefetch`; the order never depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import CheckpointError, DamagedBlockError
from dstrain.base.protocols import Corrupt, MicroBatch, StepData
from dstrain.base.world import World
from dstrain.data.config import DamagePolicy
from dstrain.data.damage import ClosedBlock, Quarantine, stand_in
from dstrain.data.ledger import LEDGER_MODULUS, LEDGER_VERSION
from dstrain.data.lookahead import Lookahead
from dstrain.data.micro_batch import make_micro_batches, split_evenly
from dstrain.data.order import ORDER_VERSION
from dstrain.data.packing import PACKER_VERSION
from dstrain.data.plan import PLAN_VERSION, PlannedRows, num_micro_batches
from dstrain.data.plan_spec import PlanSpec
from dstrain.data.rows import PlannedRow, RowSource
from dstrain.data.source_order import EMPTY
from dstrain.data.timeline import with_window

Int64 = npt.NDArray[np.int64]

Reshape = Callable[[MicroBatch, int], MicroBatch]

ERA_EPOCHS = 1 << 20
"""Epoch numbers of each era begin here times the era, so that new data gets masks of its own."""


@dataclass(frozen=True)
class PlannedSteps:
    """All rows of some steps, as the loader delivers them; arrays (n,) int64, in order of step and slot."""

    step: Int64
    slot: Int64
    source: Int64
    """Number of the source in `PackedLoader.names`."""
    epoch: Int64
    block: Int64
    """-1 where the slot trains nothing: an exact epoch's tail, a skipped row, or a row of a closed block."""
    row: Int64


class PackedLoader:
    """Implements `base.protocols.Loader` for packed rows of one or several sources."""

    def __init__(
        self, sources: Mapping[str, RowSource], spec: PlanSpec, corrupt: Corrupt, *, corruption: str, world: World, micro_batch: int,
        damage: DamagePolicy = "fail", damage_allowance: float = 1e-4, lookahead_bytes: int = 0, reshape: Reshape | None = None,
    ) -> None:  # fmt: skip
        """Join the parts.

        Args:
            sources: rows of the training split of each source, by the names the spec knows.
            spec: what decides their order.
            corrupt: the objective's corruption of a micro-batch.
            corruption: a text that names the corruption and its settings; part of the state.
            world: whose share this is.
            micro_batch: most rows of one forward.
            damage: what becomes of rows that cannot be read.
            damage_allowance: share of all blocks that may be damaged.
            reshape: cuts the segments of a step's micro-batches; sees what has been masked and entered in the ledger.
            lookahead_bytes: tell the datasets which blocks of this size together come next; 0 for local ones.
        """
        self.names = spec.names
        self.sources = tuple(sources[name] for name in spec.names)
        self.spec = self._configured = spec
        self.stepped_over: tuple[tuple[int, int], ...] = ()
        self.plan = spec.build()
        self.era, self.origin = 0, 0
        self.history: list[dict[str, Any]] = []
        self._corrupt, self._corruption, self._reshape = corrupt, corruption, reshape
        self._world, self._micro_batch, self._damage = world, micro_batch, damage
        num_blocks = sum(source.dataset.manifest.num_blocks for source in self.sources)
        self.quarantine = Quarantine(self.names, num_blocks=num_blocks, allowance=damage_allowance)
        self._planned: dict[tuple[int, int], list[PlannedRows]] = {}
        self._lookahead_bytes = lookahead_bytes
        self._lookahead = self._look_ahead()
        self.rows_per_epoch = sum(order.rows_per_epoch for order in self.plan.orders)
        self.steps_per_epoch = self.rows_per_epoch / spec.phases[0].global_batch

    def step(self, step: int) -> StepData:
        """This rank's micro-batches of optimizer step `step` (from 0).

        Raises:
            DamagedBlockError: a block is damaged and the policy is to fail.
        """
        if self._lookahead is not None:
            self._lookahead.at(step)
        planned = self._share(step)
        columns = (planned.source, planned.epoch + self.era * ERA_EPOCHS, planned.block, planned.row)
        rows: list[PlannedRow] = list(zip(*(column.tolist() for column in columns)))
        parts = split_evenly(rows, self.num_micro_batches(step))
        damaged: set[tuple[int, int]] = set()
        made = [self._readable(some, step, damaged) for some in _in_batches(parts)]
        num_rows = sum(count for _, _, count in made)
        batches = [batch for some, _, _ in made for batch in some]
        return StepData(
            micro_batches=batches if self._reshape is None else [self._reshape(batch, step) for batch in batches],
            num_rows=num_rows,
            padded_tokens=num_rows * self.sources[0].sequence_length,
            ledger=sum(digest for _, digest, _ in made) % LEDGER_MODULUS,
            epoch=self._epoch(step + 1),
            damaged=tuple(sorted((self.names[source], block) for source, block in damaged)),
        )

    def _share(self, step: int) -> PlannedRows:
        """This rank's rows of a step, planned with its neighbours in one go."""
        rows = self.plan.global_batch(step) // self._world.size
        length = min(_STEPS_PLANNED, max(1, _ROWS_PLANNED // max(1, rows)))
        first = step // length * length
        found = self._planned.get((first, length))
        if found is None:
            begin = max(first, self.origin)
            made = self.plan.shares(begin, first + length, rank=self._world.rank, world_size=self._world.size)
            found = [made[0]] * (begin - first) + made  # steps before the origin are never asked for
            # The threads are near each other and the lookahead is a little further on: a few runs of steps serve all.
            for old in list(self._planned)[:-_PLANNED_KEPT]:
                self._planned.pop(old, None)
            self._planned[first, length] = found
        return found[step - first]

    def _blocks_of(self, step: int) -> list[tuple[int, int]]:
        planned = self._share(step)
        return [(s, b) for s, b in zip(planned.source.tolist(), planned.block.tolist()) if b != EMPTY]

    def _block_bytes(self, source: int, block: int) -> int:
        facts = self.sources[source].dataset.manifest
        return 2 * facts.num_tokens // max(1, facts.num_blocks)  # blocks of a dataset are of one size, nearly

    def num_micro_batches(self, step: int) -> int:
        """Forwards of a step, the same on every rank."""
        batch = self.plan.global_batch(step)
        return num_micro_batches(batch, micro_batch=self._micro_batch, world_size=self._world.size)

    def planned(self, first: int, last: int) -> PlannedSteps:
        """What all ranks together train on in the steps [first, last), as far as the agreed state tells."""
        steps = self.plan.shares(first, last, rank=0, world_size=1)
        sizes = [len(planned.row) for planned in steps]
        none = [np.zeros(0, dtype=np.int64)]
        source, epoch, block, row = (
            np.concatenate(none + [getattr(planned, name) for planned in steps]) for name in ("source", "epoch", "block", "row")
        )  # fmt: skip
        step = np.repeat(np.arange(first, last, dtype=np.int64), sizes)
        slot = np.concatenate(none + [np.arange(size, dtype=np.int64) for size in sizes])
        for name, number, since in self.quarantine.entries():
            gone = np.flatnonzero((source == self.names.index(name)) & (block == number) & (step >= since))
            for at in gone.tolist():
                instead = self._instead((int(source[at]), int(epoch[at]), number, int(row[at])), int(step[at]), set())
                block[at], row[at] = instead[2:] if instead else (EMPTY, EMPTY)
        return PlannedSteps(step, slot, source, epoch + self.era * ERA_EPOCHS, block, row)

    def close_blocks(self, blocks: Sequence[tuple[str, int]], *, from_step: int) -> list[ClosedBlock]:
        """Do without damaged blocks from a step on; called with the same arguments on every rank.

        Raises:
            DataError: more blocks are damaged than the allowance lets pass.
        """
        return self.quarantine.close(blocks, from_step=from_step)

    def state_dict(self) -> dict[str, Any]:
        """What pins the order; the position is the step counter of the run."""
        return {
            "kind": "packed",
            "order_version": ORDER_VERSION,
            "plan_version": PLAN_VERSION,
            "packer_version": PACKER_VERSION,
            "ledger_version": LEDGER_VERSION,
            "corruption": self._corruption,
            "sequence_length": self.sources[0].sequence_length,
            "fingerprints": {name: s.dataset.manifest.fingerprint for name, s in zip(self.names, self.sources)},
            **self._configured.pinned(1 << 62),
            "era": self.era,
            "origin": self.origin,
            "closed_blocks": [list(entry) for entry in self.quarantine.entries()],
            "stepped_over": [list(window) for window in self.stepped_over],
            "history": self.history,
        }

    def restore(self, state: Mapping[str, Any], *, step: int, accept_new_data: bool = False) -> str | None:
        """Go on at a step: check that the same data comes, or begin a recorded new era with other data.

        Args:
            state: of the checkpoint.
            step: optimizer steps done.
            accept_new_data: take data or an order that differ, from this step on.

        Returns:
            What differs when a new era began; None otherwise.

        Raises:
            CheckpointError: the data or its order differ; each key with its value then and now.
        """
        now = {**self.state_dict(), **self._configured.pinned(step)}
        difference = state_difference(saved=_until(state, step), now=now, ignore=_RESTORED)
        if difference and not accept_new_data:
            raise CheckpointError(
                f"the data order changed since the checkpoint ({difference}): restore these settings, "
                "or go on with the new data on purpose with --accept-new-data, which records a new phase"
            )
        self.history = list(state.get("history", []))
        if difference:
            self.history.append({**{k: v for k, v in state.items() if k != "history"}, "until_step": step})
            self.era, self.origin = int(state.get("era", 0)) + 1, step
            self.stepped_over = ()
        else:
            self.era, self.origin = int(state.get("era", 0)), int(state.get("origin", 0))
            self.quarantine.restore(state.get("closed_blocks", []))
            self.stepped_over = tuple((int(a), int(b)) for a, b in state.get("stepped_over", []))
        self._replan()
        return difference or None

    def phase_of(self, step: int) -> int:
        """Number of the phase of the data, with its batch and weights, that a step belongs to."""
        return self.plan.timeline.place(step).phase

    def rows_of(self, step: int) -> list[tuple[str, int, int]]:
        """(source, block, row) of everything that all ranks together train on in a step."""
        found = self.planned(step, step + 1)
        rows = zip(found.source.tolist(), found.block.tolist(), found.row.tolist())
        return [(self.names[source], block, row) for source, block, row in rows if block != EMPTY]

    def skip_window(self, first: int, last: int, *, from_step: int) -> None:
        """Step over the data that steps [first, last) would have taken; see `base.protocols.Loader`.

        Windows of `data.skip_steps` keep their steps; those of earlier roll-backs keep their data.

        Raises:
            ValueError: no window, or one that would change the data of steps already done.
        """
        if not max(from_step, self.origin) <= first < last:
            raise ValueError(f"[{first}, {last}) is no window of steps after step {from_step}")
        rows = sum(self.plan.global_batch(step) for step in range(first, last))
        length = -(-rows // self.plan.global_batch(first))  # a window is counted in steps of the phase it begins in
        self.stepped_over = with_window(self.stepped_over, first, first + length)
        self._replan()

    def _replan(self) -> None:
        windows = tuple(sorted([*self._configured.skip_steps, *self.stepped_over]))
        self.spec = replace(self._configured, skip_steps=windows)
        self.plan = self.spec.build(origin=self.origin, era=self.era)
        self._planned.clear()
        self._lookahead = self._look_ahead()

    def _look_ahead(self) -> Lookahead | None:
        if not self._lookahead_bytes:
            return None
        return Lookahead(
            [source.dataset for source in self.sources], blocks_of=self._blocks_of,
            block_bytes=self._block_bytes, limit_bytes=self._lookahead_bytes,
            kept_bytes=sum(source.cache_bytes for source in self.sources) // 2,
        )  # fmt: skip

    def _readable(
        self, parts: Sequence[Sequence[PlannedRow]], step: int, damaged: set[tuple[int, int]]
    ) -> tuple[list[MicroBatch], int, int]:
        """Micro-batches, their ledger and their rows; blocks found damaged join `damaged`."""
        while True:
            present = [self._present(part, step, damaged) for part in parts]
            try:
                return *make_micro_batches(self.sources, present, self._corrupt, step=step), sum(map(len, present))
            except DamagedBlockError as error:
                names = [source.dataset.name for source in self.sources]
                found = (names.index(error.dataset), error.block) if error.dataset in names else None
                if self._damage == "fail" or found is None or found in damaged:
                    raise
                damaged.add(found)

    def _present(self, rows: Sequence[PlannedRow], step: int, damaged: set[tuple[int, int]]) -> list[PlannedRow]:
        kept = [self._instead(row, step, damaged) for row in rows if row[2] != EMPTY]
        return [row for row in kept if row is not None]

    def _instead(self, row: PlannedRow, step: int, damaged: set[tuple[int, int]]) -> PlannedRow | None:
        source, _, block, _ = row
        if (source, block) not in damaged and not self.quarantine.is_closed(source, block, step):
            return row
        closed = self.quarantine.closed[self.names[source]]
        avoid = {b for b in closed if closed[b] <= step} | {b for s, b in damaged if s == source}
        return stand_in(self._damage, self.plan, row, avoid=avoid)

    def _epoch(self, step: int) -> float:
        return float(self.plan.source_turns(step).sum()) / self.rows_per_epoch


def _in_batches(parts: Sequence[Sequence[PlannedRow]]) -> Iterator[Sequence[Sequence[PlannedRow]]]:
    """Micro-batches that are made in one go: as many as the rows of one go allow, at least one."""
    first, rows = 0, 0
    for number, part in enumerate(parts):
        if number > first and rows + len(part) > _ROWS_AT_ONCE:
            yield parts[first:number]
            first, rows = number, 0
        rows += len(part)
    yield parts[first:]


_ROWS_PLANNED, _STEPS_PLANNED, _PLANNED_KEPT = 4096, 64, 4
_ROWS_AT_ONCE = 256  # enough to drown NumPy's fixed costs, and a step's arrays stay in the processor's caches

_RESTORED = ("era", "origin", "closed_blocks", "stepped_over", "history")
"""Keys of the state that are taken over, not compared."""


def _until(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A saved state without what it said about steps that had not come yet."""
    kept = dict(state)
    if isinstance(kept.get("phases"), list):
        kept["phases"] = [phase for phase in kept["phases"] if phase[0] < step]
        kept["skip_steps"] = [window for window in kept.get("skip_steps", []) if window[0] < step]
        kept["skip_rows"] = [entry for entry in kept.get("skip_rows", []) if entry[1] < step]
    return kept


def state_difference(*, saved: Mapping[str, Any], now: Mapping[str, Any], ignore: Sequence[str] = ()) -> str:
    """A readable diff of two loader states; empty when both pin the same data order."""
    keys = sorted(key for key in {*saved, *now} if key not in ignore and saved.get(key) != now.get(key))
    return "; ".join(f"{key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in keys)
