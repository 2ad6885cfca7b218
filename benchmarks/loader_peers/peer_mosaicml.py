"""MosaicML Streaming: MDS shards of rows, `StreamingDataset` (py1e shuffle, its default) and `StreamingDataLoader`.

Rows have a fixed shape in the encoding (`ndarray:uint16:512`), the leanest it offers; shards of its default 64 MiB. Runs in
an environment of its own: its pins clash with those of the other libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contract import BasePeer, Settings
from corpus import Corpus, number_of

NEEDS = ("mosaicml-streaming", "torch", "numpy")
IMPORTS = ("streaming", "torch")


def convert(corpus: Corpus, folder: Path, settings: Settings) -> None:
    from streaming import MDSWriter

    row = settings.row_length - 2 if settings.corpus.name == "count" else settings.row_length
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:uint16:{row}"}) as out:
        for tokens in corpus.rows(row):
            out.write({"tokens": np.asarray(tokens)})


def _collate(samples: list[dict[str, np.ndarray]]) -> Any:
    """torch's default collation refuses uint16 arrays in older versions; stacking first is also faster."""
    import torch

    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


class Peer(BasePeer):
    def open(self, state: dict[str, Any] | None) -> None:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        s = self.settings
        if s.world == 1:
            clean_stale_shared_memory()  # what its documentation says to call after an earlier process was killed
        dataset = StreamingDataset(
            local=str(s.folder / "mds"), shuffle=True, shuffle_seed=s.seed, batch_size=s.rank_batch
        )  # fmt: skip
        self._rows = dataset.size
        self._loader = StreamingDataLoader(dataset, batch_size=s.rank_batch, num_workers=s.workers, collate_fn=_collate)
        if state is not None:
            self._loader.load_state_dict(state)

    def batches(self) -> Iterator[Any]:
        return iter(self._loader)

    def tokens(self, batch: Any) -> int:
        return batch.numel()

    def numbers(self, batch: Any) -> list[int]:
        return [number_of(row) for row in batch.numpy()]

    def state(self, batches_done: int) -> dict[str, Any]:
        return self._loader.state_dict()

    def length(self) -> int:
        return self._rows // self.settings.batch
