"""How a document with its masks becomes text; whole steps are in tests/stages/test_audit.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dstrain.data.tokenizer import Tokenizer, train_tokenizer
from dstrain.stages.replay import ReplayedDocument, marked_text, spans


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Tokenizer:
    out = tmp_path_factory.mktemp(request.param) / "tok"
    return Tokenizer.load(
        train_tokenizer(texts, kind=request.param, vocab_size=400, out=out, lowercase=True, quiet=True)
    )


def document(tokenizer: Tokenizer, text: str, *, hide: dict[int, str]) -> ReplayedDocument:
    """`hide` maps places to mask, random or kept."""
    (truth,) = tokenizer.encode_documents([text])
    truth = truth.astype(np.int64)
    shown, scored = truth.copy(), np.zeros(len(truth), dtype=np.bool_)
    for at, kind in hide.items():
        scored[at] = True
        if kind != "kept":
            shown[at] = tokenizer.mask_id if kind == "mask" else truth[(at + 1) % len(truth)]
    found = tuple(spans(truth, shown, scored, tokenizer=tokenizer, word_starts=tokenizer.word_starts()))
    return ReplayedDocument("train", 0, 0, 0, 0, 0, 0, len(truth), len(hide), found)


TEXT = "the quick brown fox jumps over a lazy dog while seven wise owls watch"


def letters(text: str) -> str:
    return "".join(text.split())


def test_without_masks_the_text_is_the_document(tokenizer: Tokenizer) -> None:
    assert letters(marked_text(document(tokenizer, TEXT, hide={}))) == letters(TEXT)


def test_each_fate_has_its_mark_and_the_text_stays_whole(tokenizer: Tokenizer) -> None:
    found = document(tokenizer, TEXT, hide={0: "mask", 3: "random", 5: "kept"})
    kinds = [span.kind for span in found.spans if span.kind != "plain"]
    assert kinds == ["mask", "random", "kept"]
    assert letters("".join(span.text for span in found.spans)) == letters(TEXT)
    text = marked_text(found)
    assert text.startswith("[MASK:")
    assert "→" in text
    assert text.count("=") == 2


def test_words_keep_their_spaces(tokenizer: Tokenizer) -> None:
    """A scored token inside a word does not tear the word apart."""
    (ids,) = tokenizer.encode_documents([TEXT])
    found = document(tokenizer, TEXT, hide=dict.fromkeys(range(len(ids)), "kept"))
    assert "".join((" " if s.space_before else "") + s.text for s in found.spans).split() == TEXT.split()


def test_a_painter_sees_every_mark_with_its_kind(tokenizer: Tokenizer) -> None:
    found = document(tokenizer, TEXT, hide={1: "mask", 2: "kept"})
    painted = marked_text(found, lambda kind, text: text if kind == "plain" else f"<{kind}>")
    assert "<mask>" in painted
    assert "<kept>" in painted
    assert "[MASK:" not in painted


def test_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    texts = [f"evil \x1b[31m text \x9b {n}" for n in range(50)]
    folder = train_tokenizer(texts, kind="bpe", vocab_size=300, out=tmp_path / "tok", lowercase=False, quiet=True)
    tokenizer = Tokenizer.load(folder)
    shown = marked_text(document(tokenizer, texts[0], hide={}))
    assert "evil" in shown
    assert "\x1b" not in shown
    assert "\x9b" not in shown
