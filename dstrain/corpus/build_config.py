"""What a build of shards is asked for: the settings, the request that decides every byte, and what comes back.

Equal requests give equal bytes. How many processes work, where the inputs lie and in which order they were named is no
part of a request. Reads no input and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from dstrain.base.config import Config
from dstrain.corpus.documents import corpus_identity
from dstrain.corpus.filters import FiltersConfig, filters_identity
from dstrain.corpus.sources import CorpusConfig, Source
from dstrain.data.manifest import Manifest
from dstrain.data.shard_writer import Compression
from dstrain.data.tokenizer import Tokenizer

BUILDER_VERSION = 3
"""Raised when the same request would give other bytes."""
TRAIN, VALIDATION, TOKENIZER = "train", "validation", "tokenizer"


class ShardBuildConfig(Config):
    """How text becomes shards."""

    corpus: CorpusConfig = CorpusConfig()
    """How files become documents."""
    filters: FiltersConfig = FiltersConfig()
    """Which documents are kept; everything is off by default."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the global shuffle; what is held out does not depend on it."""
    block_tokens: int = Field(default=131072, ge=64, le=1 << 24)
    """Tokens of a block: 128Ki pads rows of up to 2048 by about 1 %; use 1048576 for rows of 8192."""
    shard_bytes: int = Field(default=512 << 20, ge=4096, le=1 << 36)
    """Size at which a shard is cut, in bytes: 1 T tokens in shards of 512 MB are about 4000 files. Reduce tasks share no
    shard, so a corpus of some GB has smaller ones."""
    validation_fraction: float = Field(default=0.01, ge=0, le=0.5)
    """Share of documents held out by document hash; 0 writes no validation split."""
    deduplicate: bool = True
    """Drop documents whose text equals another's byte for byte."""
    compression: Compression = "none"
    """zstd stores tokens in about 0.4 of the bytes, for object stores; none reads faster from local disks."""
    workers: int = Field(default=1, ge=1, le=512)
    """Processes on this machine; 1 stays in this process and lets the tokenizer use threads. Does not change the
    output."""


@dataclass(frozen=True)
class BuildReport:
    """What a build gave."""

    path: Path
    train: Manifest
    validation: Manifest | None
    reused: bool
    """The output existed already, made from the same inputs and settings."""
    counts: dict[str, int]
    """documents_read, empty, duplicates, train_documents, validation_documents."""
    seconds: float
    """Wall time of this call."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents left out by reason: empty, duplicate, and what filters say."""
    encoding_seconds: float = 0.0
    """CPU time of all reduce tasks (sorting, tokenising, writing), of earlier calls too; 0 for a reused output."""

    @property
    def tokens_per_core_second(self) -> float:
        """Measured tokens per CPU second of the reduce tasks; 0 for a reused output."""
        tokens = self.train.num_tokens + (self.validation.num_tokens if self.validation else 0)
        return tokens / self.encoding_seconds if self.encoding_seconds else 0.0


def dataset_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest fields that a tokenizer decides."""
    return {
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.name,
        "frame_prefix": list(tokenizer.frame_prefix),
        "frame_suffix": list(tokenizer.frame_suffix),
        "special_ids": list(tokenizer.special_ids),
    }


def build_request(
    sources: Iterable[Source], sha256s: Mapping[str, str], tokenizer: Tokenizer, config: ShardBuildConfig
) -> dict[str, Any]:
    """All that decides the output, as plain data. Inputs count by content and file name, not by place.

    Args:
        sources: whole inputs.
        sha256s: content hash of each file by `Source.name`.
        tokenizer: what tokenises.
        config: the settings.
    """
    found = [
        {"name": Path(s.name).name, "bytes": s.size_bytes, "sha256": sha256s[s.name]} if s.is_file else {"name": s.name}
        for s in sources
    ]
    return {
        "builder_version": BUILDER_VERSION,
        "inputs": sorted(found, key=lambda entry: (str(entry["name"]), str(entry.get("sha256")))),
        "tokenizer_sha256": tokenizer.fingerprint,
        "settings": settings_identity(config),
    }


def settings_identity(config: ShardBuildConfig) -> dict[str, Any]:
    """The settings that decide bytes, as plain data."""
    return {
        **config.model_dump(mode="json", exclude={"workers", "corpus"}),
        "corpus": corpus_identity(config.corpus),
        "filter_packages": filters_identity(config.filters),
    }


def request_differences(before: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """Names of what two requests do not share, for a message."""
    names = {"inputs": "inputs", "tokenizer_sha256": "tokenizer", "builder_version": "dstrain version"}
    found = [name for key, name in names.items() if before.get(key) != request[key]]
    old, new = before.get("settings") or {}, request["settings"]
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return found + [f"settings ({', '.join(changed)})"] * bool(changed)


def content_key(data: Any) -> str:
    """32 hex digits that name plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
