"""dstrain: block shards, the pure plan, the packer, masks. The only file here that knows dstrain's loader.

Default settings: blocks of 128 Ki tokens, automatic lanes, windows of 8,192 rows; masking as `objective` has it by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contract import BasePeer, Settings
from corpus import Corpus, number_of

NEEDS = ("dstrain", "torch")
IMPORTS = (
    "dstrain.data.loader", "dstrain.data.plan_spec", "dstrain.data.prefetch", "dstrain.data.reader",
    "dstrain.data.row_index", "dstrain.data.tokenizer", "dstrain.objectives.masking",
)  # fmt: skip
COUNT_BLOCK_DOCUMENTS = 64
_STEPS_PLANNED = 64  # as the loader does, which plans some thousand rows in one go


def convert(corpus: Corpus, folder: Path, settings: Settings) -> None:
    from dstrain.corpus.build_config import dataset_identity
    from dstrain.data.shard_writer import ShardWriter
    from dstrain.data.tokenizer import Tokenizer

    # Shards of 8 MB, not 512 MB: the set is small, and readers that share shards out need several each.
    small = settings.corpus.name == "count"
    block = COUNT_BLOCK_DOCUMENTS * settings.row_length if small else 131072
    identity = dataset_identity(Tokenizer.load(corpus.tokenizer))
    writer = ShardWriter(folder, identity=identity, block_tokens=block, shard_bytes=(1 << 18) if small else 8 << 20)
    for document in corpus.documents():
        writer.add(np.asarray(document))
    writer.finish(provenance={})


class Peer(BasePeer):
    caches_epoch = True

    def open(self, state: dict[str, Any] | None) -> None:
        from dstrain.data.config import DataConfig
        from dstrain.data.plan_spec import plan_spec
        from dstrain.data.reader import ShardDataset
        from dstrain.data.row_index import rows_per_block

        s = self.settings
        self._step = 0 if state is None else int(state["step"])
        self._dataset = ShardDataset(s.folder)
        if s.form == "blocks":
            return
        manifest = self._dataset.manifest
        rows = rows_per_block(
            self._dataset, num_blocks=manifest.num_blocks, fingerprint=manifest.fingerprint, sequence_length=s.row_length,
            frame_length=len(manifest.frame_prefix) + len(manifest.frame_suffix), may_write=True,
        )  # fmt: skip
        config = DataConfig(path=str(s.folder), sequence_length=s.row_length)
        self._spec = plan_spec(config, {"train": rows}, global_batch=s.batch, seed=s.seed)
        self._plan = self._spec.build()
        self._masking = _masking(s) if s.form != "rows" else None

    def _source(self) -> Any:
        """Rows with an empty cache of blocks: every epoch reads and packs anew."""
        from dstrain.data.rows import RowSource

        return RowSource(
            self._dataset, sequence_length=self.settings.row_length, word_starts=None, cache_bytes=1 << 30
        )  # fmt: skip

    def _loader(self) -> Any:
        from dstrain.base.world import World
        from dstrain.data.loader import PackedLoader

        s = self.settings
        return PackedLoader(
            {"train": self._source()}, self._spec, self._masking, corruption=self._masking.description,
            world=World(rank=s.rank, size=s.world), micro_batch=s.rank_batch,
        )  # fmt: skip

    def batches(self) -> Iterator[Any]:
        form = self.settings.form
        if form == "blocks":
            order = np.random.default_rng(self.settings.seed).permutation(self._dataset.manifest.num_blocks)
            return (self._dataset.read(int(block)) for block in order)
        if form == "rows":
            return self._rows()
        loader = self._loader()
        if form == "prefetch":
            return self._prefetched(loader)
        return (loader.step(step) for step in range(self._step, self.length()))

    def _rows(self) -> Iterator[Any]:
        """This rank's rows of the rest of the epoch; an epoch has no barrier, so it is cut off here for counting."""
        s = self.settings
        source = self._source()
        for step in range(self._step, self.length(), _STEPS_PLANNED):
            end = min(step + _STEPS_PLANNED, self.length())
            for planned in self._plan.shares(step, end, rank=s.rank, world_size=s.world):
                kept = planned.epoch == 0
                yield np.concatenate(source.row_tokens(zip(planned.block[kept].tolist(), planned.row[kept].tolist())))

    def _prefetched(self, loader: Any) -> Iterator[Any]:
        from dstrain.data.prefetch import Prefetcher

        with Prefetcher(loader, first_step=self._step, last_step=self.length(), depth=2) as steps:
            for _, data in steps:
                yield data

    def length(self) -> int:
        return -(-self._plan.orders[0].rows_per_epoch // self.settings.batch)

    def tokens(self, batch: Any) -> int:
        if self.settings.form == "rows":
            return len(batch)
        if self.settings.form == "blocks":
            return len(batch.tokens)
        return sum(micro.num_tokens for micro in batch.micro_batches)

    def numbers(self, batch: Any) -> list[int]:
        starts = np.flatnonzero(batch == self._dataset.manifest.frame_prefix[0])  # each piece begins with [CLS]
        return [number_of(batch[start + 1 : start + 3]) for start in starts]

    def state(self, batches_done: int) -> dict[str, Any]:
        return {"step": self._step + batches_done}


def _masking(settings: Settings) -> Any:
    from dstrain.data.tokenizer import Tokenizer
    from dstrain.objectives.masking import Masking, MaskingConfig

    tokenizer = Tokenizer.load(settings.corpus.parent / "tokenizer")
    return Masking(
        MaskingConfig(), seed=settings.seed, stream="train", mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
