from __future__ import annotations

import pytest

from dstrain.base.errors import StorageError
from dstrain.data import encoding
from dstrain.data.encoding import encode_stream
from dstrain.data.tokenizer import Tokenizer

# That several processes give what one gives, in order, is shown by test_build's test of workers.


def test_every_text_gives_one_array_even_an_empty_one(tokenizer_folder, texts, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_TEXTS", 7)
    tokenizer = Tokenizer.load(tokenizer_folder)
    given = [*texts, "", "   "]
    found = list(encode_stream(iter(given), tokenizer, workers=1))
    assert [tokenizer.decode(ids) for ids in found] == [text.strip() for text in given]
    assert {ids.dtype for ids in found} == {tokenizer.dtype}


def test_texts_are_drawn_batch_by_batch(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_TEXTS", 3)
    drawn: list[int] = []

    def texts():
        for k in range(100):
            drawn.append(k)
            yield "a dog"

    stream = encode_stream(texts(), Tokenizer.load(tokenizer_folder), workers=1)
    next(stream)
    assert len(drawn) == 3


def test_a_killed_process_is_a_passing_fault_with_a_hint(tokenizer_folder, texts, monkeypatch):
    tokenizer = Tokenizer.load(tokenizer_folder)
    monkeypatch.setattr(tokenizer, "folder", tokenizer_folder / "gone")  # the spawned processes die at their start
    with pytest.raises(StorageError, match="--workers"):
        list(encode_stream(texts, tokenizer, workers=2))
