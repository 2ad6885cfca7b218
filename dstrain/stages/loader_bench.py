"""Measure the training loader on somebody's own shards and storage, part by part; changes nothing, needs no model and no GPU.

CPU seconds are of the process, so other work on the machine counts little. The parts are timed apart on the same blocks;
a loop over real steps then shows what the storage gives and what comes out at the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil

from dstrain.base.errors import DataError
from dstrain.base.progress import bar
from dstrain.base.world import World
from dstrain.data.blocks import Block, BlockDataset, BlockFacts
from dstrain.data.ledger import ledger_digest
from dstrain.data.prefetch import Prefetcher
from dstrain.data.reader import ShardDataset
from dstrain.data.rows import RowSource, gather
from dstrain.data.source_order import EMPTY
from dstrain.stages.bench_advice import Measured
from dstrain.stages.config import PretrainConfig
from dstrain.stages.training_data import (
    TRAIN,
    TrainingData,
    is_remote,
    open_training_data,
    row_source,
    source_paths,
    training_masking,
)

_PART_BLOCKS = 48
"""Blocks that the parts are timed on, at most; about 6 million tokens."""
_FAR_STEP = 1_000_000


@dataclass(frozen=True)
class BenchSettings:
    """How to measure."""

    seconds: float = 10.0
    """Wall seconds of the loop over steps."""
    rank_share: int = 1
    """Ranks the global batch is shared among; rank 0's share is measured."""
    threads: int = 1
    """Threads that make steps."""
    quiet: bool = False


class _TimedDataset:
    """A dataset whose reads are timed; everything else is the dataset itself."""

    def __init__(self, dataset: BlockDataset) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.manifest: BlockFacts = dataset.manifest
        self.reads = 0
        self.wall_s = self.cpu_s = 0.0
        self.stored_bytes = 0
        self._records = getattr(dataset, "blocks", None)

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        return self._dataset.ends(block)

    def read(self, block: int) -> Block:
        wall, cpu = time.perf_counter(), time.thread_time()
        found = self._dataset.read(block)
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.thread_time() - cpu
        self.reads += 1
        self.stored_bytes += stored_bytes(self._records, block, found)
        return found

    def will_need(self, blocks: Sequence[int]) -> None:
        self._dataset.will_need(blocks)

    def close(self) -> None:
        self._dataset.close()

    def __getattr__(self, name: str) -> Any:  # a remote dataset may offer more than the Protocol
        return getattr(self._dataset, name)


def stored_bytes(records: Any, block: int, found: Block) -> int:
    """Bytes of a block in its shard; without an index in memory, its size as arrays."""
    if isinstance(records, np.ndarray) and {"len", "ends_off"} <= set(records.dtype.names or ()):
        return int(records[block]["len"]) + int(records[block]["ends_off"])
    return found.tokens.nbytes + found.ends.nbytes


def bench_loader(config: PretrainConfig, settings: BenchSettings) -> Measured:
    """Measure.

    Args:
        config: a pretraining configuration; only data, objective, seed and batch are used.
        settings: how.

    Raises:
        DstrainError: the data cannot be opened or read.
    """
    begun = time.perf_counter()
    data = open_training_data(config, World(size=settings.rank_share, local_size=settings.rank_share))
    timed = [_TimedDataset(source.dataset) for source in data.loader.sources]
    for source, dataset in zip(data.loader.sources, timed):
        source.dataset = dataset
    data.loader.step(0)
    first_batch_s = time.perf_counter() - begun
    seek_ms = {"start": _seek_ms(data, 0), "far": _seek_ms(data, _FAR_STEP)}
    parts, padding, block_memory = _time_parts(config, data, timed)
    wall_s, mtok, store_mb_s = _time_loop(config, data, timed, settings)
    working_set = _working_set(data, settings.rank_share, block_memory)
    facts = [dataset.manifest for dataset in data.datasets.values()]
    num_tokens = max(1, data.num_tokens)
    return Measured(
        sequence_length=config.data.sequence_length,
        cpu_s_per_mtok=parts,
        wall_s=wall_s,
        wall_mtok=mtok,
        reread_factor=_reread_factor(data, working_set, config.data.cache_bytes),
        block_tokens=num_tokens / max(1, sum(fact.num_blocks for fact in facts)),
        padding_percent=padding,
        bytes_per_token=_bytes_per_token(data, timed),
        remote=any(map(is_remote, source_paths(config.data).values())),
        compressed=_is_compressed(data),
        store_mb_s=store_mb_s,
        working_set_bytes=working_set,
        cache_bytes=config.data.cache_bytes,
        first_batch_s=first_batch_s,
        seek_ms=seek_ms,
        rss_bytes=int(psutil.Process().memory_info().rss),
    )


def _seek_ms(data: TrainingData, step: int) -> float:
    """Find the rows of a step with a plan that has never been asked."""
    plan = data.spec.build()
    begun = time.perf_counter()
    plan.slots(step, 0, plan.global_batch(step))
    return 1000 * (time.perf_counter() - begun)


def _time_parts(
    config: PretrainConfig, data: TrainingData, timed: Sequence[_TimedDataset]
) -> tuple[dict[str, float], float, float]:
    """CPU seconds for a million tokens by part, padding in percent, and memory of a block."""
    blocks = _sample_blocks(data)
    before = sum(dataset.cpu_s for dataset in timed)
    fresh = _fresh(config, data, timed)
    cpu = time.process_time()
    memory = [fresh[source].block(block).size_bytes for source, block in blocks]
    making = time.process_time() - cpu
    reading = sum(dataset.cpu_s for dataset in timed) - before
    rows = [
        (source, 0, block, row)
        for source, block in blocks
        for row in range(int(data.spec.rows_per_block[source][block]))
    ]
    if not rows:
        raise DataError("the sampled blocks hold no rows: build the shards from text first")
    masking = training_masking(config, data.tokenizer, stream=TRAIN)
    seconds = dict.fromkeys(("gather", "masking", "ledger"), 0.0)
    tokens = 0
    for begin in range(0, len(rows), config.train.micro_batch):
        marks = [time.process_time()]
        pieces, _ = gather(fresh, rows[begin : begin + config.train.micro_batch])
        marks.append(time.process_time())
        corrupted = masking(pieces, step=0)
        marks.append(time.process_time())
        ledger_digest(pieces, corrupted, step=0)
        marks.append(time.process_time())
        tokens += len(pieces.tokens)
        for part, (start, end) in zip(seconds, pairwise(marks)):
            seconds[part] += end - start
    seconds = {"read": reading, "packing": max(0.0, making - reading), **seconds}
    padding = 100 * (1 - tokens / (len(rows) * config.data.sequence_length))
    return {part: s / tokens * 1e6 for part, s in seconds.items()}, padding, sum(memory) / len(memory)


def _fresh(config: PretrainConfig, data: TrainingData, timed: Sequence[_TimedDataset]) -> list[RowSource]:
    """The same rows with empty caches."""
    return [
        row_source(config, name, cast(Any, dataset), data.tokenizer) for name, dataset in zip(data.loader.names, timed)
    ]


def _sample_blocks(data: TrainingData) -> list[tuple[int, int]]:
    """The blocks that training would ask for first, in its order."""
    planned = data.loader.plan.slots(0, 0, data.loader.plan.global_batch(0))
    pairs = [(s, b) for s, b in zip(planned.source.tolist(), planned.block.tolist()) if b != EMPTY]
    return list(dict.fromkeys(pairs))[:_PART_BLOCKS]


def _time_loop(
    config: PretrainConfig, data: TrainingData, timed: Sequence[_TimedDataset], settings: BenchSettings
) -> tuple[float, float, float]:
    """Wall seconds, million tokens, and MB/s while a read was waited for."""
    wall_before = sum(dataset.wall_s for dataset in timed)
    bytes_before = sum(dataset.stored_bytes for dataset in timed)
    begun = time.perf_counter()
    tokens = 0
    prefetcher = Prefetcher(
        data.loader, first_step=1, last_step=1 << 40, depth=max(1, config.data.prefetch_steps),
        threads=settings.threads, limit_bytes=config.data.prefetch_bytes,
    )  # fmt: skip
    with prefetcher as steps, bar(total=None, description="steps", unit="tok", quiet=settings.quiet) as progress:
        for _, made in steps:
            count = sum(batch.num_tokens for batch in made.micro_batches)
            tokens += count
            progress.update(count)
            if time.perf_counter() - begun >= settings.seconds:
                break
        wall_s = time.perf_counter() - begun
    waited = sum(dataset.wall_s for dataset in timed) - wall_before
    came = sum(dataset.stored_bytes for dataset in timed) - bytes_before
    if not came:  # everything was in the cache already: what the first step read
        waited, came = wall_before, bytes_before
    return wall_s, tokens / 1e6, came / max(1e-9, waited) / 1e6


def _working_set(data: TrainingData, ranks: int, block_bytes: float) -> int:
    """Memory of the blocks that one rank's open shuffle windows draw from."""
    total = 0.0
    lanes = -(-data.spec.lanes // ranks)
    for rows in data.spec.rows_per_block:
        mean = max(1.0, float(rows.mean()))
        per_lane = min(data.spec.window_rows, int(rows.sum()) // data.spec.lanes) / mean
        total += min(len(rows), lanes * (per_lane + 1)) * block_bytes
    return int(total)


def _reread_factor(data: TrainingData, working_set: int, cache_bytes: int) -> float:
    """Reads of a block while its window lasts. Rows of a window come in random order: a miss costs the whole block."""
    if working_set <= cache_bytes:
        return 1.0
    rows = np.concatenate(data.spec.rows_per_block)
    return max(1.0, (1 - cache_bytes / working_set) * float(rows.mean()))


def _bytes_per_token(data: TrainingData, timed: Sequence[_TimedDataset]) -> float:
    """On disk: whole block shards, or of foreign tars, which hold more than tokens, the parts that were read."""
    if all(isinstance(dataset, ShardDataset) for dataset in data.datasets.values()):
        total = sum(shard.bytes for dataset in data.datasets.values() for shard in dataset.manifest.shards)
        return total / max(1, data.num_tokens)
    reads = sum(dataset.reads for dataset in timed)
    mean_tokens = data.num_tokens / max(1, sum(d.manifest.num_blocks for d in data.datasets.values()))
    return sum(dataset.stored_bytes for dataset in timed) / max(1.0, reads * mean_tokens)


def _is_compressed(data: TrainingData) -> bool:
    for dataset in data.datasets.values():
        records = getattr(dataset, "blocks", None)
        if isinstance(records, np.ndarray) and "raw_len" in (records.dtype.names or ()) and len(records):
            if (records["raw_len"] != records["len"]).any():
                return True
    return False
