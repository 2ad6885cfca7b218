"""Pieces made by hand, as the gather of rows would make them, for tests of what is done to them."""

from __future__ import annotations

import numpy as np

from dstrain.base.protocols import Pieces

HEAD_ID, TAIL_ID = 2, 3


def pieces_of(documents, *, uids=None, epochs=0, starts=None, word_starts=None, head=1, tail=1, before=None):
    """Each document, or the rest of it from `starts` on, as one framed segment, longest first.

    Args:
        documents: arrays of ids: the content of each segment.
        uids: identity of each (default 0, 1, 2, ...).
        epochs: of each, or one for all.
        starts: position in its document of each segment's first token (default 0).
        word_starts: (vocab,) True where a token begins a word.
        head, tail: special tokens around each.
        before: for segments with a start above 0: the ids before it, to number words by.
    """
    n = len(documents)
    uids = np.arange(n) if uids is None else np.asarray(uids, dtype=np.int64)
    starts = np.zeros(n, dtype=np.int64) if starts is None else np.asarray(starts, dtype=np.int64)
    epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), (n,))
    sizes = np.array([len(document) for document in documents], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    lengths = sizes[order] + head + tail
    framed = [np.concatenate([[HEAD_ID] * head, documents[i], [TAIL_ID] * tail]).astype(np.uint16) for i in order]
    words, first_words = None, None
    if word_starts is not None and n:
        flags, first_words = [], []
        for i in order:
            whole = np.concatenate([before[i] if before else [], documents[i]]).astype(np.int64)
            begins = word_starts[whole].copy()
            begins[:1] = True
            cut = len(whole) - len(documents[i])
            first_words.append(int(begins[: cut + 1].sum()) - 1)
            begins[cut] = True
            flags.append(np.concatenate([[False] * head, begins[cut:], [False] * tail]).astype(bool))
        words, first_words = np.concatenate(flags), np.array(first_words, dtype=np.int64)
    return Pieces(
        tokens=np.concatenate(framed) if n else np.zeros(0, dtype=np.uint16),
        offsets=np.concatenate([np.arange(length) for length in lengths]) if n else np.zeros(0, dtype=np.int64),
        lengths=lengths,
        documents=uids[order],
        starts=starts[order],
        epochs=epochs[order].copy(),
        head=head,
        tail=tail,
        word_begins=words,
        first_words=first_words,
    )
