"""webdataset 1.x: the same block shards as dstrain, and tars with one `.npy` a document.

As its documentation advises: `.npy` members decoded straight to arrays with NumPy, `shardshuffle=100` and `shuffle(1000)`
with a fixed seed (an unseeded shard shuffle could not be replayed), `split_by_node`, batches inside the workers,
`WebLoader`. It has no resume: what is documented is to go through the samples again and drop them, which is done here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contract import BasePeer, Settings
from corpus import Corpus, number_of

NEEDS = ("webdataset", "torch")
IMPORTS = ("webdataset",)
SHARDS = 12


def convert(corpus: Corpus, folder: Path, settings: Settings) -> None:
    import webdataset as wds

    documents = corpus.documents()
    per_shard = -(-len(documents) // SHARDS)
    with wds.ShardWriter(str(folder / "docs-%06d.tar"), maxcount=per_shard, maxsize=1 << 40, verbose=0) as sink:
        for number, document in enumerate(documents):
            sink.write({"__key__": f"{number:09d}", "tokens.npy": np.asarray(document)})


def _npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _block(sample: dict[str, Any]) -> list[np.ndarray]:
    return [_npy(sample["tokens.npy"]), _npy(sample["ends.npy"])]


def _document(sample: dict[str, Any]) -> np.ndarray:
    return _npy(sample["tokens.npy"])


def _flat(documents: list[np.ndarray]) -> list[np.ndarray]:
    """Tokens back to back and their lengths: two arrays cross a worker's queue far faster than one for each document."""
    return [np.concatenate(documents), np.array([len(document) for document in documents])]


class Peer(BasePeer):
    def open(self, state: dict[str, Any] | None) -> None:
        import webdataset as wds

        s = self.settings
        urls = sorted(map(str, s.folder.glob("*.tar")))
        shuffled = s.form == "shuffled"
        dataset = wds.WebDataset(
            urls,
            shardshuffle=100 if shuffled else False,
            seed=s.seed,
            nodesplitter=wds.split_by_node,
            empty_check=False,
        )
        if s.form == "blocks":
            dataset = dataset.map(_block)
        else:
            dataset = dataset.map(_document)
            if shuffled:
                dataset = dataset.shuffle(1000, seed=s.seed)
            dataset = dataset.batched(s.rank_batch, collation_fn=_flat)
        # Without workers the pipeline is iterated itself, which is its fastest form.
        self._loader = wds.WebLoader(dataset, batch_size=None, num_workers=s.workers) if s.workers else dataset
        # Ranks of another world size each drop their share of what was consumed.
        self._skip = 0 if state is None else state["batches"]

    def batches(self) -> Iterator[Any]:
        stream = iter(self._loader)
        for _ in range(self._skip):
            next(stream, None)
        return stream

    def tokens(self, batch: Any) -> int:
        return len(batch[0])

    def numbers(self, batch: Any) -> list[int]:
        starts = np.cumsum(batch[1]) - batch[1]
        return [number_of(batch[0][start : start + 2]) for start in starts]
