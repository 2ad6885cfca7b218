from __future__ import annotations

from dstrain.corpus import encoding
from dstrain.corpus.encoding import encode_stream
from dstrain.data.tokenizer import Tokenizer


def test_every_text_gives_one_array_even_an_empty_one(tokenizer_folder, texts, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_TEXTS", 7)
    tokenizer = Tokenizer.load(tokenizer_folder)
    given = [*texts, "", "   "]
    found = list(encode_stream(iter(given), tokenizer))
    assert [tokenizer.decode(ids) for ids in found] == [text.strip() for text in given]
    assert {ids.dtype for ids in found} == {tokenizer.dtype}


def test_texts_are_drawn_batch_by_batch(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_TEXTS", 3)
    drawn: list[int] = []

    def texts():
        for k in range(100):
            drawn.append(k)
            yield "a dog"

    stream = encode_stream(texts(), Tokenizer.load(tokenizer_folder))
    next(stream)
    assert len(drawn) == 3
