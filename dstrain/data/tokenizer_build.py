"""Train a tokenizer from a corpus, once: the same inputs and settings find the finished folder and return it.

Joins `corpus` and `tokenizer`; what was asked for is kept beside the tokenizer in `training.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.base.logs import get_logger
from dstrain.base.progress import bar
from dstrain.base.storage import file_sha256, read_json
from dstrain.data.corpus import CorpusConfig, Source, find_sources, read_documents
from dstrain.data.tokenizer import TRAINING_NAME, Tokenizer, TokenizerKind, train_tokenizer

_LOG = get_logger(__name__)


class TokenizerBuildConfig(Config):
    """How a tokenizer is trained."""

    corpus: CorpusConfig = CorpusConfig()
    """How files become documents."""
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


@dataclass(frozen=True)
class TokenizerReport:
    """What training gave."""

    tokenizer: Tokenizer
    reused: bool
    """The folder existed already, trained from the same inputs and settings."""


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
    """
    config = config or TokenizerBuildConfig()
    sources = find_sources(inputs)
    request: dict[str, Any] = {
        "inputs": sorted(f"{Path(s.name).name} {file_sha256(Path(s.name))}" if s.is_file else s.name for s in sources),
        "settings": config.model_dump(mode="json"),
    }
    if out.is_dir() and any(out.iterdir()):
        if not overwrite and (out / TRAINING_NAME).exists() and read_json(out / TRAINING_NAME) == request:
            _LOG.info("%s exists already, trained from the same inputs and settings: nothing to do", out)
            return TokenizerReport(Tokenizer.load(out), reused=True)
        if overwrite and not (out / "tokenizer.json").exists():
            raise DataError(f"{out}: exists and holds no tokenizer; choose another --out or empty it")
    total = None if any(s.size_bytes is None for s in sources) else sum(s.size_bytes or 0 for s in sources)
    with bar(total=total, description="reading text", unit="B", quiet=quiet) as progress:
        train_tokenizer(
            _texts(sources, config.corpus, progress),
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
    return TokenizerReport(Tokenizer.load(out), reused=False)


def _texts(sources: Sequence[Source], config: CorpusConfig, progress: Any) -> Iterator[str]:
    for document in read_documents(sources, config, on_bytes=progress.update):
        yield document.text
    progress.set_description("learning the vocabulary")
