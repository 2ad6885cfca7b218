"""The tokens every peer gets: real text, tokenised once, as one flat array and document ends.

Two sets. `speed` holds real text in documents of web-like length (log-normal, mean about 700 tokens, median about 400, as
measured on web crawls; the corpus itself has 50-token comments and 15,000-token chapters), repeated in another order until
it is long enough to be measured. `count` holds documents of one row each that begin with their own number, so that lost
and repeated ones are counted exactly. Runs in the main process, where dstrain is installed; the peers only read the arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MEDIAN_LENGTH, LENGTH_SIGMA = 402, 1.05
COUNT_ROWS, COUNT_LENGTH = 9600, 128
DIGIT, DIGIT_BASE = (
    1000,
    100,
)  # a document's number is written as two tokens of three digits each, above the special ids


@dataclass(frozen=True)
class Corpus:
    """Tokens of all documents back to back, and where each ends."""

    tokens: np.ndarray
    """(T,) uint16"""
    ends: np.ndarray
    """(D,) int64"""
    tokenizer: Path

    def documents(self) -> list[np.ndarray]:
        return np.split(self.tokens, self.ends[:-1])

    def rows(self, length: int) -> np.ndarray:
        """Concatenated and cut, as peers without a packer do; (R, length)."""
        count = len(self.tokens) // length
        return self.tokens[: count * length].reshape(count, length)


def load(folder: Path) -> Corpus:
    return Corpus(
        np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "ends.npy"), folder.parent / "tokenizer"
    )


def prepare(files: Sequence[str], *, work: Path, mtok: float, vocab: int) -> Path:
    """Make both sets below `work`, or find them there; returns the folder that holds them."""
    from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents

    sources = find_sources(files)
    key = json.dumps([[Path(s.name).name, s.size_bytes] for s in sources] + [mtok, vocab])
    folder = work / f"corpus-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "ready").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in read_documents(sources, CorpusConfig()) if document.text.strip()]
    documents = _tokenise(texts, folder / "tokenizer", vocab)
    _save(folder / "speed", *_repeat(documents, int(mtok * 1e6)))
    _save(folder / "count", *_numbered())
    (folder / "ready").write_text("")
    return folder


def _tokenise(texts: list[str], folder: Path, vocab: int) -> list[np.ndarray]:
    from dstrain.data.tokenizer import Tokenizer, train_tokenizer

    if not (folder / "tokenizer.json").exists():
        train_tokenizer(iter(texts), kind="wordpiece", vocab_size=vocab, lowercase=True, out=folder, quiet=True)
    tokenizer = Tokenizer.load(folder)
    return [ids for at in range(0, len(texts), 512) for ids in tokenizer.encode_documents(texts[at : at + 512])]


def _repeat(documents: list[np.ndarray], target: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    parts, total = [], 0
    while total < target:
        for at in random.permutation(len(documents)):
            parts.append(documents[at])
            total += len(documents[at])
            if total >= target:
                break
    tokens = np.concatenate(parts)[:target].astype(np.uint16)
    count = 4 * target // MEDIAN_LENGTH
    lengths = np.clip(random.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA, count).astype(np.int64), 8, 100_000)
    ends = np.cumsum(lengths)
    ends = ends[: np.searchsorted(ends, target)]
    return tokens[: ends[-1]], ends


def _numbered() -> tuple[np.ndarray, np.ndarray]:
    """Each document fills one row together with [CLS] and [SEP]."""
    content = COUNT_LENGTH - 2
    tokens = np.full((COUNT_ROWS, content), DIGIT_BASE, dtype=np.uint16)
    high, low = np.divmod(np.arange(COUNT_ROWS), DIGIT)
    tokens[:, 0], tokens[:, 1] = DIGIT_BASE + high, DIGIT_BASE + low
    return tokens.reshape(-1), np.arange(1, COUNT_ROWS + 1, dtype=np.int64) * content


def number_of(row: np.ndarray) -> int:
    """The number written into a document of the `count` set (its first two tokens)."""
    return (int(row[0]) - DIGIT_BASE) * DIGIT + int(row[1]) - DIGIT_BASE


def _save(folder: Path, tokens: np.ndarray, ends: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "ends.npy", ends)
