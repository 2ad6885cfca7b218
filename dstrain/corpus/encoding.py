"""Tokenise a stream of texts in order, batch by batch, in this process.

Several processes scale better than threads inside the tokenizer library, so a build runs several tasks, each with one
thread, and this stays simple. Knows nothing of where texts come from or tokens go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy.typing as npt

from dstrain.data.tokenizer import Tokenizer

BATCH_TEXTS = 1024
BATCH_CHARACTERS = 1 << 20


def encode_stream(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[npt.NDArray[Any]]:
    """Yield the ids of each text, in order, without special tokens.

    Args:
        texts: any number of documents, drawn as they are needed.
        tokenizer: a loaded folder; uses the threads that RAYON_NUM_THREADS and TOKENIZERS_PARALLELISM allow.
    """
    for batch in _batched(texts):
        yield from tokenizer.encode_documents(batch)


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) >= BATCH_TEXTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
