"""LitData: `optimize` into chunks of 64 MB, `TokensLoader` rows, `StreamingDataLoader` with its `state_dict`.

Tokens are stored as uint16 tensors without a header, the leanest form `TokensLoader` reads. Local data, shuffled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from contract import BasePeer, Settings
from corpus import Corpus, load, number_of

NEEDS = ("litdata", "torch")
IMPORTS = ("litdata",)
PIECES = 64


def _piece(job: tuple[str, int, int]) -> Any:
    import torch

    folder, first, last = job
    return torch.from_numpy(np.asarray(load(Path(folder)).tokens[first:last]).copy())


def convert(corpus: Corpus, folder: Path, settings: Settings) -> None:
    import litdata

    # A chunk's rows are cut inside the chunk: pieces are whole rows, so that nothing is left over.
    row = _row_length(settings)
    rows = len(corpus.tokens) // row
    bounds = np.linspace(0, rows, PIECES + 1).astype(int) * row
    jobs = [(str(settings.corpus), int(a), int(b)) for a, b in pairwise(bounds)]
    litdata.optimize(
        fn=_piece, inputs=jobs, output_dir=str(folder), chunk_size=max(row, (16 << 20) // row * row), num_workers=1,
        item_loader=litdata.TokensLoader(block_size=row), verbose=False, reorder_files=False,
    )  # fmt: skip
    (folder / "rows.json").write_text(json.dumps({"row": row, "rows": rows}))


def _row_length(settings: Settings) -> int:
    """Documents of the `count` set leave room for [CLS] and [SEP], which LitData does not add."""
    return settings.row_length - 2 if settings.corpus.name == "count" else settings.row_length


class Peer(BasePeer):
    def open(self, state: dict[str, Any] | None) -> None:
        import litdata

        s = self.settings
        self._about = json.loads((s.folder / "rows.json").read_text())
        dataset = litdata.StreamingDataset(
            str(s.folder), item_loader=litdata.TokensLoader(block_size=self._about["row"]), shuffle=True, seed=s.seed,
            drop_last=True,
        )  # fmt: skip
        self._loader = litdata.StreamingDataLoader(dataset, batch_size=s.rank_batch, num_workers=s.workers)
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
        return self._about["rows"] // self.settings.batch
