"""wids shard lists: JSON of kind `wids-shard-index-v1` that says which shards there are, and how large.

Layout (webdataset's wids, version 1): `{"__kind__", "wids_version": 1, "shardlist": [{"url", "nsamples", "filesize",
"md5sum"}]}`, the last two optional. URLs are never opened: only their last parts are compared with the shards' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dstrain.base.errors import DataError
from dstrain.base.storage import read_json

KIND = "wids-shard-index-v1"
_LIMIT_BYTES = 64 << 20


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    url: Annotated[str, Field(min_length=1, max_length=4096)]
    nsamples: Annotated[int, Field(ge=0, lt=1 << 40)] | None = None
    filesize: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    md5sum: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class _List(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    wids_version: Literal[1]
    shardlist: Annotated[list[_Entry], Field(max_length=1 << 20)]


@dataclass(frozen=True)
class WidsShard:
    """What a wids list says of one shard."""

    source: str
    """The list's file."""
    num_samples: int | None
    size_bytes: int | None
    md5: str | None


def find_wids(
    root: Path, shards: Sequence[Path], *, named: Path | None, search: bool
) -> tuple[dict[Path, WidsShard], list[str]]:
    """Entries of the named list and of those found in `root`, by shard, and the lists' names.

    Raises:
        DataError: a list is damaged, or names a shard that is not there.
    """
    paths = sorted(root.glob("*.json")) if search else []
    lists = [path for path in paths if _is_list(path)]
    if named is not None and named not in lists:
        lists.append(named)
    found: dict[Path, WidsShard] = {}
    for path in lists:
        found |= _read(path, shards)
    return found, [str(path) for path in lists]


def _is_list(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
    return KIND.encode() in head


def _read(path: Path, shards: Sequence[Path]) -> dict[Path, WidsShard]:
    data = read_json(path, limit_bytes=_LIMIT_BYTES)
    if not isinstance(data, dict) or data.get("__kind__") != KIND:
        raise DataError(f"{path}: is no wids shard list (its __kind__ is not {KIND!r})")
    try:
        listed = _List.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: damaged wids shard list: {key}: {first['msg']}") from None
    found: dict[Path, WidsShard] = {}
    for entry in listed.shardlist:
        shard = _match(entry.url, shards)
        if shard is None:
            raise DataError(
                f"{path}: lists the shard {entry.url!r}, which is not among the {len(shards)} given. Copy it too, or leave "
                "such lists aside with --ignore-other-indexes"
            )
        found[shard] = WidsShard(str(path), entry.nsamples, entry.filesize, entry.md5sum)
    return found


def _match(url: str, shards: Sequence[Path]) -> Path | None:
    parts = [part for part in urlsplit(url).path.split("/") if part]
    best: tuple[int, Path] | None = None
    for shard in shards:
        same = 0
        for a, b in zip(reversed(parts), reversed(shard.parts)):
            if a != b:
                break
            same += 1
        if same and (best is None or same > best[0]):
            best = (same, shard)
    return best[1] if best is not None else None
