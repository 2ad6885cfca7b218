"""`manifest.json` of an index over foreign tars, and the two tables beside it; trusted only after every bound is checked.

`samples.idx` holds 20 bytes for each used sample, `blocks.idx` 32 for each block, a run of samples of one shard that is
read and checked as a whole. The fingerprint covers all that decides which tokens are read: the shards by size and hash,
the chosen member, the tokenizer, both tables; not where the shards lie. Opens no shard.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from dstrain.base.errors import DataError
from dstrain.base.storage import file_sha256, read_json, write_json
from dstrain.data.manifest import Count, Sha256, StrictModel, check_totals
from dstrain.foreign.payloads import MAX_NPY_HEADER_BYTES, MemberChoice
from dstrain.foreign.ranges import GAP_BYTES, UNIT

KIND = "dstrain-foreign-index"
FORMAT_VERSION = 1
MANIFEST_NAME, SAMPLES_NAME, BLOCKS_NAME = "manifest.json", "samples.idx", "blocks.idx"
SAMPLE = np.dtype([("off", "<u8"), ("len", "<u4"), ("tokens", "<u4"), ("lead", "<u2"), ("width", "<u2")])
"""A used member: payload offset and size in bytes, its tokens, and for npy the header's size and the bytes of an id."""
BLOCK = np.dtype(
    [("shard", "<u4"), ("samples", "<u4"), ("tokens", "<u4"), ("crc32", "<u4"), ("begin", "<u8"), ("first", "<u8")]
)
"""A block: shard, number of samples and tokens, CRC-32 of its stretches, where they begin, and its first sample."""
MAX_BLOCK_BYTES = 96 << 20
"""Bytes a block may make us read: bounds what a hostile index can allocate."""

_CHECKED_TOGETHER = 1 << 18  # samples


class ForeignShard(StrictModel):
    """One tar of somebody else's."""

    name: Annotated[str, Field(min_length=1, max_length=4096)]
    """Path below the root, with forward slashes."""
    bytes: Count
    sha256: Sha256
    blocks: Count
    tokens: Count
    documents: Count

    @model_validator(mode="after")
    def _plain_path(self) -> ForeignShard:
        parts = self.name.split("/")
        if "" in parts or ".." in parts or "." in parts or ":" in parts[0] or not self.name.isprintable():
            raise ValueError(f"{self.name!r} is not a plain relative path")
        return self


class ForeignManifest(StrictModel):
    """The table of contents of one split of an index."""

    kind: Literal["dstrain-foreign-index"]
    format_version: Literal[1]
    fingerprint: Sha256
    """SHA-256 over the content fields; equal fingerprints mean equal training data."""
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]
    dtype: Literal["uint16", "uint32"]
    """Type of the ids in a block that was read, whatever the npy members hold."""
    frame_prefix: Annotated[tuple[Count, ...], Field(max_length=16)]
    frame_suffix: Annotated[tuple[Count, ...], Field(max_length=16)]
    special_ids: Annotated[tuple[Count, ...], Field(max_length=65536)]
    member: MemberChoice
    """Where each sample's document is."""
    num_tokens: Count
    num_documents: Count
    num_blocks: Annotated[int, Field(ge=0, lt=1 << 32)]
    index_sha256: Sha256
    """SHA-256 of blocks.idx."""
    samples_sha256: Sha256
    """SHA-256 of samples.idx."""
    root: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder of the shards, as seen from this manifest's folder, or absolute; not part of the fingerprint."""
    shards: Annotated[tuple[ForeignShard, ...], Field(max_length=1 << 20)]
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> ForeignManifest:
        check_totals(self)
        if self.fingerprint != content_fingerprint(self.model_dump(mode="json")):
            raise ValueError("fingerprint is not that of the content: the manifest was edited or damaged")
        return self


def content_fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 in hex of a manifest's content fields, in canonical JSON."""
    kept = {key: value for key, value in content.items() if key not in ("fingerprint", "provenance", "root")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> ForeignManifest:
    """Write `folder/manifest.json` from its content fields (without kind, version and fingerprint)."""
    data = {"kind": KIND, "format_version": FORMAT_VERSION, **content}
    data["fingerprint"] = content_fingerprint(data)
    manifest = ForeignManifest.model_validate_json(json.dumps(data))
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(folder: Path) -> ForeignManifest:
    """Load and check `folder/manifest.json`.

    Raises:
        DataError: it is missing, of another kind or version, or breaks a bound.
    """
    path = folder / MANIFEST_NAME
    data = read_json(path)
    found = (data.get("kind"), data.get("format_version")) if isinstance(data, dict) else (None, None)
    if found != (KIND, FORMAT_VERSION):
        raise DataError(
            f"{path}: kind and version are {found}, this dstrain reads {(KIND, FORMAT_VERSION)}. "
            "Make the index again with `dstrain shards index`"
        )
    try:
        return ForeignManifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        raise DataError(
            f"{path}: {key + ': ' if key else ''}{reason}. Make the index again with `dstrain shards index`"
        ) from None


def read_tables(folder: Path, manifest: ForeignManifest) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The sample and block tables, mapped, their hashes and all bounds checked.

    Raises:
        DataError: naming file and fault.
    """
    samples = _table(folder / SAMPLES_NAME, SAMPLE, manifest.num_documents, manifest.samples_sha256)
    blocks = _table(folder / BLOCKS_NAME, BLOCK, manifest.num_blocks, manifest.index_sha256)
    problem = _problem(samples, blocks, manifest)
    if problem:
        raise DataError(f"{folder / BLOCKS_NAME}: {problem}. Make the index again with `dstrain shards index`")
    return samples, blocks


def _table(path: Path, dtype: np.dtype[Any], count: int, sha256: str) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: is missing. Make the index again with `dstrain shards index`") from None
    if size != count * dtype.itemsize or file_sha256(path) != sha256:
        raise DataError(
            f"{path}: is not the table the manifest names. Make the index again with `dstrain shards index`"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype=dtype)


def _problem(samples: npt.NDArray[Any], blocks: npt.NDArray[Any], manifest: ForeignManifest) -> str | None:
    if len(blocks) == 0:
        return None if len(samples) == 0 else "samples without blocks"
    first, count = blocks["first"].astype(np.int64), blocks["samples"].astype(np.int64)
    if first[0] != 0 or (count == 0).any() or not np.array_equal(first + count, [*first[1:], len(samples)]):
        return "the blocks are no partition of the samples"
    shard = blocks["shard"].astype(np.int64)
    if (np.diff(shard) < 0).any() or shard[-1] >= len(manifest.shards):
        return "the blocks' shards are out of order or unknown"
    limits = np.array([entry.bytes for entry in manifest.shards], dtype=np.int64)
    low = 0
    while low < len(blocks):  # a part at a time: the temporaries take ten times the table
        high = max(low + 1, int(np.searchsorted(first, first[low] + _CHECKED_TOGETHER)))
        start, stop = int(first[low]), int(first[high]) if high < len(blocks) else len(samples)
        problem = _part_problem(samples[start:stop], blocks[low:high], first[low:high] - start, limits, manifest)
        if problem:
            return problem
        low = high
    return None


def _part_problem(
    samples: npt.NDArray[Any],
    blocks: npt.NDArray[Any],
    first: npt.NDArray[np.int64],
    limits: npt.NDArray[np.int64],
    manifest: ForeignManifest,
) -> str | None:
    if (samples["off"] >= np.uint64(1 << 62)).any() or (blocks["begin"] >= np.uint64(1 << 62)).any():
        return "an offset is beyond all files"
    off, size = samples["off"].astype(np.int64), samples["len"].astype(np.int64)
    tokens, lead, width = (samples[name].astype(np.int64) for name in ("tokens", "lead", "width"))
    begin, last = blocks["begin"].astype(np.int64), first + blocks["samples"].astype(np.int64) - 1
    inside = np.ones(len(samples), dtype=bool)
    inside[first] = False  # a block's first sample has no neighbour before it
    ends = off + -(-size // UNIT) * UNIT
    near = (off[first] - begin >= UNIT) & (off[first] - UNIT - begin <= GAP_BYTES)
    outside = (ends[last] > limits[blocks["shard"].astype(np.int64)]).any()
    if (inside[1:] & (off[1:] - UNIT < ends[:-1])).any() or not near.all() or outside:
        return "samples overlap, are out of order or lie outside their shard"
    gaps = np.zeros(len(samples), dtype=np.int64)
    between = off[1:] - ends[:-1]  # the header included, which is read also where a gap is skipped
    gaps[1:] = np.where(inside[1:], np.where(between - UNIT <= GAP_BYTES, between, UNIT), 0)
    if (np.add.reduceat(ends - off + gaps, first) > MAX_BLOCK_BYTES).any():
        return "a block is larger than a block may be"
    if not np.array_equal(np.add.reduceat(tokens, first), blocks["tokens"].astype(np.int64)) or (tokens == 0).any():
        return "the token counts do not add up"
    if manifest.member.form == "npy":
        bad = (lead + tokens * width != size) | ~np.isin(width, (2, 4, 8)) | (lead > MAX_NPY_HEADER_BYTES)
        return "an npy member has an impossible layout" if bad.any() else None
    return None
