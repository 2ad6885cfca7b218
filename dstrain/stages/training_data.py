"""The data of a pretraining run: sources opened and checked against one tokenizer, rows counted, the loader that orders them.

Needs no model and no engine, so that looking at a run's data (audit, replay, bench) costs what the data costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DamagedBlockError, DataError
from dstrain.base.locations import RemoteUrl, child_location, parse_location
from dstrain.base.protocols import MicroBatch, ShouldLeave, never
from dstrain.base.seeds import derive
from dstrain.base.world import World
from dstrain.data.config import DataConfig
from dstrain.data.loader import PackedLoader, Reshape
from dstrain.data.plan_spec import SINGLE_SOURCE, PlanSpec, check_repeats, plan_spec, planned_tokens
from dstrain.data.reader import ShardDataset
from dstrain.data.remote_tokenizer import fetch_tokenizer
from dstrain.data.row_index import rows_per_block
from dstrain.data.rows import RowSource
from dstrain.data.segment_warmup import cut_segments, longest_at
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.open import open_dataset
from dstrain.objectives.masking import Masking
from dstrain.stages.config import PretrainConfig

Dataset: TypeAlias = ShardDataset | ForeignDataset

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class TrainingData:
    """What a pretraining run reads."""

    tokenizer: Tokenizer
    datasets: Mapping[str, Dataset]
    """The training split of each source."""
    spec: PlanSpec
    loader: PackedLoader
    epochs: Mapping[str, float]
    """Epochs of each source that the whole run takes."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all training splits."""
        return sum(dataset.manifest.num_tokens for dataset in self.datasets.values())

    @property
    def num_documents(self) -> int:
        """Documents of all training splits."""
        return sum(dataset.manifest.num_documents for dataset in self.datasets.values())


def is_remote(path: str) -> bool:
    """Whether a source lies behind a URL."""
    return isinstance(parse_location(path), RemoteUrl)


def source_paths(config: DataConfig) -> dict[str, str]:
    """The folder or URL of each source, by name."""
    if config.path is not None:
        return {SINGLE_SOURCE: config.path}
    return {source.name: source.path for source in config.sources}


def open_training_data(config: PretrainConfig, world: World, *, should_leave: ShouldLeave = never) -> TrainingData:
    """Open every source's training split and join them to a loader; local to a rank.

    Args:
        config: of the run.
        world: this process's place.
        should_leave: asked while a remote store does not answer, now and later.

    Raises:
        Interrupted: asked to stop while waiting for a remote store.
        DataError: a source is missing or damaged, or was built with another tokenizer than the first.
        ConfigError: weights, lanes or batches do not fit the data.
    """
    paths = source_paths(config.data)
    tokenizer = load_tokenizer(config.data, should_leave=should_leave)
    datasets = {
        name: open_split(path, TRAIN, tokenizer, config.data, should_leave=should_leave) for name, path in paths.items()
    }
    sources = {name: row_source(config, name, dataset, tokenizer) for name, dataset in datasets.items()}
    rows = {name: count_rows(source, datasets[name], world) for name, source in sources.items()}
    spec = plan_spec(config.data, rows, global_batch=config.train.global_batch, seed=config.seed)
    epochs = check_repeats(config.data, spec, max_steps=config.train.max_steps)
    masking = training_masking(config, tokenizer, stream=TRAIN)
    # Local block shards are read when they are asked for; the network and tokenising processes want to know before.
    has_use = config.data.tokenising_workers > 0 or any(map(is_remote, paths.values()))
    loader = PackedLoader(
        sources, spec, masking, corruption=masking.description, world=world, micro_batch=config.train.micro_batch,
        damage=config.data.damage, damage_allowance=config.data.damage_allowance,
        lookahead_bytes=config.data.storage.prefetch_bytes if has_use else 0, reshape=_segment_warmup(config.data, spec),
    )  # fmt: skip
    return TrainingData(tokenizer, datasets, spec, loader, epochs)


def _segment_warmup(config: DataConfig, spec: PlanSpec) -> Reshape | None:
    """What cuts micro-batches, by the plan of the whole run, or None."""
    warmup, length = config.segment_warmup, config.sequence_length
    if warmup is None:
        return None

    def cut(batch: MicroBatch, step: int) -> MicroBatch:
        if warmup.until_tokens is None:
            progress = step / (warmup.until_step or 1)
        else:
            progress = planned_tokens(spec.phases, step, sequence_length=length) / warmup.until_tokens
        return cut_segments(batch, longest_at(warmup, progress=progress, sequence_length=length))

    return cut


def load_tokenizer(config: DataConfig, *, should_leave: ShouldLeave = never) -> Tokenizer:
    """The tokenizer kept with the (first) source's shards."""
    key, path = ("data.path", config.path) if config.path else ("data.sources", config.sources[0].path)
    location = parse_location(str(path))
    if isinstance(location, RemoteUrl):
        return Tokenizer.load(fetch_tokenizer(location.child("tokenizer"), config.storage, should_leave=should_leave))
    if not location.is_dir():
        raise DataError(
            f"{key}: {path}: no such folder; build it with `dstrain shards build --input ... --tokenizer ... --out {path}`"
        )
    if not (location / "tokenizer").is_dir():
        raise DataError(
            f"{key}: {path}: not a shards folder: tokenizer/ is missing in it. Give the folder that `dstrain shards build`, "
            "`index` or `convert` wrote"
        )
    return Tokenizer.load(location / "tokenizer")


def open_split(
    path: str, split: str, tokenizer: Tokenizer, config: DataConfig, *, should_leave: ShouldLeave = never
) -> Dataset:
    """Open train or validation of a source and check that it was built with the run's tokenizer.

    Raises:
        DataError: the split is missing or damaged, or was built with another tokenizer.
    """
    location = child_location(parse_location(path), split)
    dataset = open_dataset(
        location, workers=config.tokenising_workers, storage=config.storage, should_leave=should_leave
    )
    if dataset.manifest.tokenizer_sha256 != tokenizer.fingerprint:
        raise DataError(
            f"{tokenizer.folder}: is not the tokenizer that {location} was built with "
            f"(fingerprint {tokenizer.fingerprint[:12]}, the shards say {dataset.manifest.tokenizer_sha256[:12]}): "
            "put the right one back, or build the shards again"
        )
    return dataset


def row_source(config: PretrainConfig, name: str, dataset: Dataset, tokenizer: Tokenizer) -> RowSource:
    """Packed rows of a split; a named source's documents are told from every other's."""
    return RowSource(
        dataset,
        sequence_length=config.data.sequence_length,
        word_starts=tokenizer.word_starts() if config.objective.whole_word else None,
        cache_bytes=config.data.cache_bytes,
        salt=0 if config.data.path is not None else derive(0, "source", name),
    )


def count_rows(source: RowSource, dataset: Dataset, world: World) -> npt.NDArray[np.int64]:
    """(B,) rows of each block; kept beside local shards, or in the node's cache, by rank 0."""
    return rows_per_block(
        dataset, num_blocks=dataset.manifest.num_blocks, fingerprint=dataset.manifest.fingerprint,
        sequence_length=source.sequence_length, frame_length=source.frame_length, may_write=world.is_first,
    )  # fmt: skip


def training_masking(config: PretrainConfig, tokenizer: Tokenizer, *, stream: str) -> Masking:
    """The run's corruption for one stream."""
    return Masking(
        config.objective, seed=config.seed, stream=stream, mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip


def mean_context(datasets: Iterable[Dataset], sequence_length: int) -> float:
    """Σ piece² / Σ piece over a sample of blocks: what attention really costs on packed documents."""
    total, squares = 0, 0
    for dataset in datasets:
        for block in range(min(dataset.manifest.num_blocks, 64)):
            try:
                lengths = np.diff(dataset.ends(block).astype(np.int64), prepend=0).view(np.int64)
            except DamagedBlockError:
                continue
            full, tail = lengths // sequence_length, lengths % sequence_length
            total += int(lengths.sum())
            squares += int((full * sequence_length**2 + tail**2).sum())
    return squares / max(1, total)
