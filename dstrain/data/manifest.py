"""`manifest.json`: what one dataset is made of, written last and trusted only after every bound is checked.

The fingerprint is a SHA-256 over all that decides which tokens are read (shards by hash, index by hash, tokenizer,
dtype, framing) and over nothing else: the same shards built elsewhere, or moved, keep it. Provenance is for people and
for recognising a finished build. Opens no shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dstrain.base.errors import DataError
from dstrain.base.storage import read_json, write_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.tar")
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StrictModel(BaseModel):
    """Data from a file that is believed field by field: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ShardEntry(StrictModel):
    """One tar file of the dataset."""

    name: str
    """File name, e.g. shard-000000.tar; never a path."""
    bytes: Count
    """Size of the file in bytes."""
    sha256: Sha256
    blocks: Annotated[int, Field(ge=1, lt=1 << 32)]
    tokens: Count
    documents: Count

    @model_validator(mode="after")
    def _plain_name(self) -> ShardEntry:
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not a plain shard file name such as shard-000000.tar")
        return self


class Manifest(StrictModel):
    """A dataset's table of contents."""

    format_version: Literal[1]
    fingerprint: Sha256
    """SHA-256 over the content fields; equal fingerprints mean equal training data."""
    tokenizer_sha256: Sha256
    """Fingerprint of the tokenizer the ids belong to."""
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]
    dtype: Literal["uint16", "uint32"]
    frame_prefix: Annotated[tuple[Count, ...], Field(max_length=16)]
    """Ids put before each piece of a document, e.g. [CLS]."""
    frame_suffix: Annotated[tuple[Count, ...], Field(max_length=16)]
    """Ids put after each piece of a document, e.g. [SEP]."""
    special_ids: Annotated[tuple[Count, ...], Field(max_length=65536)]
    num_tokens: Count
    """Tokens of all documents, without framing."""
    num_documents: Count
    num_blocks: Annotated[int, Field(ge=0, lt=1 << 32)]
    index_sha256: Sha256
    """SHA-256 of blocks.idx."""
    shards: Annotated[tuple[ShardEntry, ...], Field(max_length=1 << 20)]
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Inputs, settings and counts of the build; not part of the fingerprint."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        check_totals(self)
        expected = content_fingerprint(self.model_dump(mode="json"))
        if self.fingerprint != expected:
            raise ValueError(f"fingerprint is not that of the content ({expected}): the manifest was edited or damaged")
        return self


def check_totals(manifest: Any) -> None:
    """What every table of contents must fulfil: shards that stand once and add up, special ids and a dtype that fit.

    Raises:
        ValueError: naming the field.
    """
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ValueError("a shard name stands twice")
    for field, part in (("num_tokens", "tokens"), ("num_documents", "documents"), ("num_blocks", "blocks")):
        found = sum(getattr(shard, part) for shard in manifest.shards)
        if found != getattr(manifest, field):
            raise ValueError(f"{field} is {getattr(manifest, field)}, but the shards add up to {found}")
    if any(i >= manifest.vocab_size for i in (*manifest.frame_prefix, *manifest.frame_suffix, *manifest.special_ids)):
        raise ValueError(f"a special id is not below vocab_size {manifest.vocab_size}")
    if manifest.vocab_size > 1 << 16 and manifest.dtype == "uint16":
        raise ValueError(f"vocab_size {manifest.vocab_size} does not fit uint16")


def content_fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 in hex of a manifest's content fields, in canonical JSON."""
    kept = {key: value for key, value in content.items() if key not in ("fingerprint", "provenance")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_manifest(content: dict[str, Any], *, provenance: dict[str, Any]) -> Manifest:
    """A manifest with its fingerprint, from plain JSON-able content fields (without format_version)."""
    data = {"format_version": FORMAT_VERSION, **content}
    data |= {"fingerprint": content_fingerprint(data), "provenance": provenance}
    return Manifest.model_validate_json(json.dumps(data))


def read_manifest(folder: Path) -> Manifest:
    """Load and check `folder/manifest.json`.

    Raises:
        DataError: it is missing, of another format version, or breaks a bound; the message names the file and the key.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise DataError(_missing(folder))
    return parse_manifest(read_json(path), source=str(path))


def parse_manifest(data: Any, *, source: str) -> Manifest:
    """Check a manifest that was parsed from JSON.

    Raises:
        DataError: it is of another format version, or breaks a bound; the message names `source` and the key.
    """
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{source}: format_version is {version!r}, this dstrain reads {FORMAT_VERSION}. "
            "Build the dataset again with `dstrain shards build`"
        )
    try:
        return Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        raise DataError(
            f"{source}: {key + ': ' if key else ''}{reason}. The manifest is damaged: copy or build the dataset again"
        ) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, which makes the dataset complete."""
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def _missing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such dataset folder. Build it with `dstrain shards build --input ... --out ...`"
    splits = [name for name in ("train", "validation") if (folder / name / MANIFEST_NAME).exists()]
    if splits:
        return f"{folder}: holds the datasets {' and '.join(splits)}; give one of them, e.g. {folder / splits[0]}"
    return (
        f"{folder}: {MANIFEST_NAME} is missing, so this is no complete dataset. "
        "Build it with `dstrain shards build --input ... --out ...`"
    )
