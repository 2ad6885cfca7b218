"""Tokenise a stream of texts in order, in this process or in several spawned ones: the result is the same.

Processes are spawned, never forked (a used tokenizer holds threads), and get texts, not files. At most a few batches
per process are under way, so memory stays bounded. Knows nothing of where texts come from or tokens go.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import StorageError
from dstrain.data.tokenizer import Tokenizer

BATCH_TEXTS = 1024
BATCH_CHARACTERS = 1 << 20

_Packed = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


class _Worker:
    """What a spawned process keeps between batches; set once by its initializer."""

    tokenizer: Tokenizer | None = None


def encode_stream(texts: Iterable[str], tokenizer: Tokenizer, *, workers: int) -> Iterator[npt.NDArray[Any]]:
    """Yield the ids of each text, in order, without special tokens.

    Args:
        texts: any number of documents, drawn as they are needed.
        tokenizer: a loaded folder.
        workers: 1 works in this process on all cores the tokenizer library takes; more spawns single-threaded ones.

    Raises:
        StorageError: a spawned process was killed, mostly for memory.
    """
    batches = _batched(texts)
    if workers == 1:
        for batch in batches:
            yield from tokenizer.encode_documents(batch)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizer.folder,)) as pool:
        under_way: deque[Future[_Packed]] = deque()
        try:
            for batch in batches:
                under_way.append(pool.submit(_encode, batch))
                if len(under_way) > 2 * workers:
                    yield from _unpack(under_way.popleft().result())
            while under_way:
                yield from _unpack(under_way.popleft().result())
        except BrokenProcessPool as error:
            raise StorageError(
                "a tokenising process was killed, mostly for want of memory: use fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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


def _start(folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.tokenizer = Tokenizer.load(folder)


def _encode(batch: list[str]) -> _Packed:
    assert _Worker.tokenizer is not None
    documents = _Worker.tokenizer.encode_documents(batch)
    return np.concatenate(documents), np.array([len(document) for document in documents], dtype=np.int64)


def _unpack(packed: _Packed) -> Iterator[npt.NDArray[Any]]:
    tokens, lengths = packed
    stop = 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        yield tokens[start:stop]
