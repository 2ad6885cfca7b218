"""Train a tokenizer from a corpus or a sample of it, once, and measure it on held-out documents.

The same inputs and settings find the finished folder and return it: what was asked for is kept beside the tokenizer in
`training.json`, what it is worth in `fertility.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.base.logs import get_logger
from dstrain.base.progress import bar
from dstrain.base.storage import read_json, write_json
from dstrain.corpus.documents import (
    CorpusConfig,
    Source,
    corpus_identity,
    find_sources,
    read_documents,
    source_sha256,
)
from dstrain.corpus.filters import Filters, FiltersConfig, filters_identity
from dstrain.corpus.sampling import HashSample, text_places
from dstrain.data.tokenizer import TRAINING_NAME, Tokenizer, TokenizerKind, train_tokenizer

FERTILITY_NAME = "fertility.json"
_HELD_OUT_SHARE = 0.05  # of a sample, by document hash: never trained on
_MEASURED_BYTES = 4 << 20  # enough for three digits of every rate, encoded in seconds
_UNKNOWN = "[UNK]"
_LOG = get_logger(__name__)


class TokenizerBuildConfig(Config):
    """How a tokenizer is trained."""

    corpus: CorpusConfig = CorpusConfig()
    """How files become documents."""
    filters: FiltersConfig = FiltersConfig()
    """Which documents are learned from; the shards' own filters fit best."""
    kind: TokenizerKind = "wordpiece"
    """wordpiece is BERT's; bpe is byte-level and loses nothing; unigram is SentencePiece's."""
    vocab_size: int = Field(default=32768, ge=16, le=1 << 24)
    """Ids, special tokens included; up to 65536 are stored in 2 bytes each, more in 4."""
    lowercase: bool = False
    """Fold case; wordpiece then strips accents too, as bert-base-uncased does."""
    min_frequency: int = Field(default=2, ge=1)
    """Pieces seen less often are not learned (wordpiece, bpe)."""
    model_max_length: int = Field(default=512, ge=8)
    """Longest input noted for users of the exported model, in tokens."""
    sample_bytes: int | None = Field(default=None, ge=1)
    """Learn from about this much text, chosen by document hash, held in memory; None for all of the text. A vocabulary
    of 32,768 hardly changes beyond some 100 MB, while the time grows with the text."""
    sample_share: float | None = Field(default=None, gt=0, le=1)
    """Learn from this share of the documents, chosen by document hash; None for all."""

    @model_validator(mode="after")
    def _one_sample(self) -> TokenizerBuildConfig:
        if self.sample_bytes is not None and self.sample_share is not None:
            raise ValueError("sample_bytes and sample_share exclude each other: give one")
        return self

    @property
    def is_sampled(self) -> bool:
        """Whether only a part of the documents is learned from, so that others can be held out."""
        return self.sample_bytes is not None or self.sample_share is not None


@dataclass(frozen=True)
class Fertility:
    """What a tokenizer makes of text."""

    documents: int
    """Measured."""
    words: int
    """Measured, cut at white space."""
    tokens_per_word: float
    """1.0 would be whole words; English with 32,768 ids is near 1.2 to 1.4."""
    characters_per_token: float
    """Text per token of compute: more is cheaper training."""
    unknown_share: float
    """Share of tokens that stand for characters the vocabulary lacks."""
    is_held_out: bool
    """Measured on documents that were not learned from."""


@dataclass(frozen=True)
class TokenizerReport:
    """What training gave."""

    tokenizer: Tokenizer
    reused: bool
    """The folder existed already, trained from the same inputs and settings."""
    fertility: Fertility | None = None
    """None where a finished folder does not tell."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Documents that the filters left out, by reason; empty for a reused folder."""


def build_tokenizer(
    inputs: Sequence[str],
    *,
    out: Path,
    config: TokenizerBuildConfig | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> TokenizerReport:
    """Train a tokenizer on `inputs` and publish `out`, or return it if it is that already.

    Args:
        inputs: files, patterns and `hf:` names, as `corpus.find_sources` takes them.
        out: the folder to publish.
        config: settings, defaults if None.
        overwrite: replace whatever tokenizer `out` holds.
        quiet: no progress bars.

    Raises:
        DataError: an input is bad, there is no text, or `out` holds something else.
        ConfigError: a filter is not installed.
    """
    config = config or TokenizerBuildConfig()
    sources = find_sources(inputs)
    request = _request(sources, config)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite and (out / TRAINING_NAME).exists() and read_json(out / TRAINING_NAME) == request:
            _LOG.info("%s exists already, trained from the same inputs and settings: nothing to do", out)
            return TokenizerReport(Tokenizer.load(out), reused=True, fertility=_read_fertility(out))
        if overwrite and not (out / "tokenizer.json").exists():
            raise DataError(f"{out}: exists and holds no tokenizer; choose another --out or empty it")
    total = None if any(s.size_bytes is None for s in sources) else sum(s.size_bytes or 0 for s in sources)
    with bar(total=total, description="reading text", unit="B", quiet=quiet) as progress:
        reading = _Reading(config)
        train_tokenizer(
            reading.training_texts(sources, progress),
            kind=config.kind,
            vocab_size=config.vocab_size,
            out=out,
            lowercase=config.lowercase,
            min_frequency=config.min_frequency,
            model_max_length=config.model_max_length,
            overwrite=overwrite,
            provenance=request,
            quiet=True,
        )
    tokenizer = Tokenizer.load(out)
    fertility = measure(tokenizer, reading.measured.texts(), is_held_out=config.is_sampled)
    if fertility is not None:
        write_json(out / FERTILITY_NAME, dataclasses.asdict(fertility))
    return TokenizerReport(tokenizer, reused=False, fertility=fertility, dropped=dict(sorted(reading.dropped.items())))


def _request(sources: Sequence[Source], config: TokenizerBuildConfig) -> dict[str, Any]:
    settings: dict[str, Any] = config.model_dump(mode="json")
    settings["corpus"] = corpus_identity(config.corpus)
    return {
        "inputs": sorted(f"{Path(s.name).name} {source_sha256(s)}" if s.is_file else s.name for s in sources),
        "settings": settings,
        "filters": filters_identity(config.filters),
    }


class _Reading:
    """One pass over the corpus: texts to learn from, texts to measure on, and what was left out."""

    def __init__(self, config: TokenizerBuildConfig):
        self._config = config
        self._filters = Filters(config.filters)
        self.measured = HashSample(_MEASURED_BYTES)
        self.dropped: Counter[str] = Counter()

    def training_texts(self, sources: Sequence[Source], progress: Any) -> Iterator[str]:
        """Yield what is learned from; the rest is noted on the way."""
        if self._config.sample_bytes is None:
            yield from self._kept(sources, progress)
        else:
            # Sorted by hash, so that the trainer sees one order whatever the order of files.
            sample = HashSample(self._config.sample_bytes)
            for text in self._kept(sources, progress):
                data = text.encode("utf-8")
                sample.add(data, text_places(data)[0])
            yield from sample.texts()
        progress.set_description("learning the vocabulary")

    def _kept(self, sources: Sequence[Source], progress: Any) -> Iterator[str]:
        share = self._config.sample_share
        count = count_empty = 0
        for document in read_documents(sources, self._config.corpus, on_bytes=progress.update):
            count += 1
            count_empty += not document.text
            document, reason = self._filters.apply(document)
            if reason is not None:
                self.dropped[reason] += 1
                continue
            data = document.text.encode("utf-8")
            place, held_out_place = text_places(data)
            if share is not None and place >= share * (1 << 64):
                continue
            if not self._config.is_sampled:
                self.measured.add(data, place)
            elif held_out_place < _HELD_OUT_SHARE * (1 << 64):
                self.measured.add(data, place)
                continue
            yield document.text
        if count == count_empty:
            names = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
            raise DataError(f"{names}: the corpus is empty ({count} documents, none with text)")
        if count and self.dropped.total() == count:
            reasons = ", ".join(f"{reason} {n}" for reason, n in self.dropped.most_common(5))
            raise DataError(f"the filters drop all {count} documents ({reasons}); loosen them")


def measure(tokenizer: Tokenizer, texts: Iterator[str], *, is_held_out: bool) -> Fertility | None:
    """Count tokens, words and unknown tokens of texts; None if there is not one word.

    Args:
        tokenizer: a loaded folder.
        texts: documents, drawn a few at a time.
        is_held_out: noted in the result.
    """
    unknown = next((i for i in tokenizer.special_ids if tokenizer.token(i) == _UNKNOWN), -1)
    documents = words = characters = tokens = unknowns = 0
    while batch := list(itertools.islice(texts, 256)):
        documents += len(batch)
        words += sum(len(text.split()) for text in batch)
        characters += sum(map(len, batch))
        for ids in tokenizer.encode_documents(batch):
            tokens += len(ids)
            unknowns += int(np.count_nonzero(ids == unknown))
    if not words or not tokens:
        return None
    return Fertility(
        documents=documents,
        words=words,
        tokens_per_word=round(tokens / words, 4),
        characters_per_token=round(characters / tokens, 4),
        unknown_share=round(unknowns / tokens, 6),
        is_held_out=is_held_out,
    )


def _read_fertility(folder: Path) -> Fertility | None:
    path = folder / FERTILITY_NAME
    if not path.exists():
        return None
    try:
        return Fertility(**read_json(path))
    except TypeError:
        return None  # written by another version; the tokenizer itself is what was asked for
