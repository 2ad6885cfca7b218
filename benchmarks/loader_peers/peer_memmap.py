"""One flat uint16 file and torch: the hand-written loader, and the speed of light for rows that need no packing.

loader: a map-style Dataset of single rows under torch's DataLoader with a seeded sampler, as most people write it; gather:
whole batches by one fancy index into the memmap; mlm: gather, then vectorised BERT masking in NumPy. Resume is skipping by
index. No checksums, no document boundaries, rows cut anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contract import BasePeer, Settings
from corpus import Corpus, number_of

NEEDS = ("torch", "numpy")
IMPORTS = ("torch.utils.data",)
MASK_RATE, MASK_ID, VOCAB = 0.3, 4, 8000


def convert(corpus: Corpus, folder: Path, settings: Settings) -> None:
    np.asarray(corpus.tokens).tofile(folder / "tokens.bin")


class Rows:
    """A torch map-style Dataset needs only these two methods."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.from_numpy(self._rows[index].astype(np.int64))


class Peer(BasePeer):
    def open(self, state: dict[str, Any] | None) -> None:
        import torch

        s = self.settings
        row = s.row_length - 2 if s.corpus.name == "count" else s.row_length
        flat = np.memmap(s.folder / "tokens.bin", dtype=np.uint16, mode="r")
        self._rows = flat[: len(flat) // row * row].reshape(-1, row)
        self._done = 0 if state is None else state["batches"]
        self._random = np.random.default_rng(s.seed)
        self._torch = torch

    def _indices(self) -> Iterator[np.ndarray]:
        s = self.settings
        mine = np.random.default_rng(s.seed).permutation(len(self._rows))[s.rank :: s.world]
        return (mine[at : at + s.rank_batch] for at in range(self._done * s.rank_batch, len(mine), s.rank_batch))

    def batches(self) -> Iterator[Any]:
        s = self.settings
        if s.form == "loader":
            sampler = [batch.tolist() for batch in self._indices()]
            return iter(
                self._torch.utils.data.DataLoader(Rows(self._rows), batch_sampler=sampler, num_workers=s.workers)
            )
        gathered = (self._rows[chosen].astype(np.int64) for chosen in self._indices())
        if s.form == "mlm":
            return (self._mask(rows) for rows in gathered)
        return (self._torch.from_numpy(rows) for rows in gathered)

    def _mask(self, rows: np.ndarray) -> Any:
        draw = self._random.random(rows.shape, dtype=np.float32)
        chosen = draw < MASK_RATE
        labels = np.where(chosen, rows, -100)
        rows[draw < MASK_RATE * 0.8] = MASK_ID
        replaced = (draw >= MASK_RATE * 0.8) & (draw < MASK_RATE * 0.9)
        rows[replaced] = self._random.integers(0, VOCAB, int(replaced.sum()))
        return self._torch.from_numpy(rows), self._torch.from_numpy(labels)

    def tokens(self, batch: Any) -> int:
        return batch[0].numel() if self.settings.form == "mlm" else batch.numel()

    def numbers(self, batch: Any) -> list[int]:
        return [number_of(row) for row in batch.numpy()]

    def length(self) -> int:
        return len(self._rows) // self.settings.batch
