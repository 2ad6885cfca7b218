"""Block shards of random ids, written without a tokenizer: real files of any size in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dstrain.data.shard_writer import ShardWriter

VOCAB = 30_000


def write_random_shards(
    folder: Path,
    *,
    documents: int = 300,
    block_tokens: int = 8192,
    shard_bytes: int = 1 << 18,
    compression: str = "none",
    seed: int = 0,
    vocab_size: int = VOCAB,
) -> Path:
    """A dataset of documents of 50 to 1999 uniformly drawn ids in `folder`."""
    identity = {
        "tokenizer_sha256": "0" * 64, "vocab_size": vocab_size, "dtype": "uint16", "frame_prefix": [2], "frame_suffix": [3],
        "special_ids": [0, 1, 2, 3, 4],
    }  # fmt: skip
    writer = ShardWriter(
        folder, identity=identity, block_tokens=block_tokens, shard_bytes=shard_bytes, compression=compression
    )
    random = np.random.default_rng(seed)
    for _ in range(documents):
        writer.add(random.integers(0, vocab_size, random.integers(50, 2000)).astype(np.uint16))
    writer.finish(provenance={})
    return folder
