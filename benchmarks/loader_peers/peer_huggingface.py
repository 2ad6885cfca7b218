"""Hugging Face datasets: rows in Arrow, read at random (map), through a shuffle buffer (iterable), and as run_mlm does.

map: `with_format("numpy")`, whole batches by index, the fastest form it documents. iterable: 16 shards, buffer of 1,000,
`split_dataset_by_node`, `state_dict`. mlm: run_mlm.py's way: text concatenated and cut (`group_texts`, done in the
conversion), `DataLoader` with `DataCollatorForLanguageModeling`. Map-style resume is the Trainer's: the sampler's seed, and
batches skipped by index without reading them (`accelerate.skip_first_batches` does the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from contract import BasePeer, Settings
from corpus import Corpus, number_of

NEEDS = ("datasets", "transformers", "torch")
IMPORTS = ("datasets", "transformers.data.data_collator", "torch")


def convert(corpus: Corpus, folder: Path, settings: Settings) -> None:
    import datasets
    import pyarrow as pa

    row = settings.row_length - 2 if settings.corpus.name == "count" else settings.row_length
    rows = corpus.rows(row)
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * row)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, values)})
    datasets.Dataset(table).save_to_disk(folder / "arrow")


class Peer(BasePeer):
    def open(self, state: dict[str, Any] | None) -> None:
        import datasets

        datasets.disable_progress_bars()
        s = self.settings
        self._state = state
        self._done = 0 if state is None or "batches" not in state else state["batches"]
        dataset = datasets.load_from_disk(str(s.folder / "arrow"))
        self._rows = len(dataset)
        opener = {"map": self._open_map, "iterable": self._open_iterable, "mlm": self._open_mlm}[s.form]
        opener(dataset)

    def _open_map(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("numpy")
        self._epoch = self._map_batches

    def _indices(self) -> Iterator[np.ndarray]:
        """DistributedSampler's order: one seeded permutation, every world-th index to each rank."""
        s = self.settings
        mine = np.random.default_rng(s.seed).permutation(self._rows)[s.rank :: s.world]
        return (mine[at : at + s.rank_batch] for at in range(self._done * s.rank_batch, len(mine), s.rank_batch))

    def _map_batches(self) -> Iterator[Any]:
        return (self._dataset[chosen]["input_ids"] for chosen in self._indices())

    def _open_iterable(self, dataset: Any) -> None:
        from datasets.distributed import split_dataset_by_node

        s = self.settings
        stream = dataset.with_format("numpy").to_iterable_dataset(num_shards=16)
        stream = stream.shuffle(seed=s.seed, buffer_size=1000)
        stream = split_dataset_by_node(stream, rank=s.rank, world_size=s.world)
        if self._state is not None and self._state["world"] == s.world:
            stream.load_state_dict(self._state["stream"])
        elif self._state is not None:  # a state belongs to its rank; another world can only skip what was seen
            stream = stream.skip(self._done * s.rank_batch)
        self._stream = stream
        self._epoch = self._stream_batches

    def _stream_batches(self) -> Iterator[Any]:
        rows = iter(self._stream)
        while batch := list(islice(rows, self.settings.rank_batch)):
            yield np.stack([row["input_ids"] for row in batch])

    def _open_mlm(self, dataset: Any) -> None:
        import torch
        from transformers import AutoTokenizer, DataCollatorForLanguageModeling

        s = self.settings
        tokenizer = AutoTokenizer.from_pretrained(s.corpus.parent / "tokenizer")
        if s.corpus.name == "count":  # masks would hide the numbers that are counted

            def collate(rows: list[dict[str, Any]]) -> Any:
                return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
        else:
            collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
        self._loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=[batch.tolist() for batch in self._indices()], collate_fn=collate,
            num_workers=s.workers,
        )  # fmt: skip
        self._epoch = lambda: iter(self._loader)

    def batches(self) -> Iterator[Any]:
        return self._epoch()

    def tokens(self, batch: Any) -> int:
        return batch["input_ids"].numel() if self.settings.form == "mlm" else batch.size

    def numbers(self, batch: Any) -> list[int]:
        rows = batch["input_ids"].numpy() if self.settings.form == "mlm" else batch
        return [number_of(row) for row in rows]

    def state(self, batches_done: int) -> dict[str, Any]:
        state = super().state(batches_done)
        return {**state, "stream": self._stream.state_dict()} if self.settings.form == "iterable" else state

    def length(self) -> int:
        return self._rows // self.settings.batch
