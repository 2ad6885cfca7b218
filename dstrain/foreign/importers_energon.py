"""Megatron-Energon's metadata: `.tar.idx` beside each shard, `.nv-meta/.info.json` and `.nv-meta/index.sqlite`.

`.tar.idx` is the uint64 offset of each sample's first header, then one for the end. `.info.json` maps shards to sample
counts, in the order of their numbers in the database. The database is opened read-only, as plain tables, under an
authorizer that allows nothing but reading two of them. A dataset's Python loaders and YAML are never looked at.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from dstrain.base.errors import DataError
from dstrain.base.storage import read_json
from dstrain.foreign.samples import Samples
from dstrain.foreign.tar_walk import Members

_TABLES = ("samples", "sample_parts")
_INFO_LIMIT_BYTES = 64 << 20
_STEPS_PER_ROW = 10_000  # virtual machine instructions a sound query needs, with a wide margin
_LONGEST_VALUE = 1 << 20  # bytes of a key
_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)


@dataclass(frozen=True)
class Energon:
    """An Energon dataset's metadata."""

    folder: Path
    """`.nv-meta`."""
    counts: dict[str, tuple[int, int]]
    """Shard, as a path below the dataset, to its number and its samples."""
    root: Path
    """The dataset's folder."""

    @property
    def database(self) -> Path:
        """index.sqlite, which older versions do not have."""
        return self.folder / "index.sqlite"


def find_energon(root: Path, shards: Sequence[Path]) -> Energon | None:
    """The metadata folder in `root`, if there is one.

    Raises:
        DataError: it is damaged, or lists a shard that is not there.
    """
    path = root / ".nv-meta" / ".info.json"
    if not path.is_file():  # also with the .info.yaml of old versions: YAML is not read here
        return None
    data = read_json(path, limit_bytes=_INFO_LIMIT_BYTES)
    counts = data.get("shard_counts") if isinstance(data, dict) else None
    if not isinstance(counts, dict) or not all(type(count) is int and count >= 0 for count in counts.values()):
        raise DataError(f"{path}: no Energon metadata: shard_counts must map shard names to sample counts")
    names = {shard.relative_to(root).as_posix() for shard in shards}
    missing = next((name for name in counts if name not in names), None)
    if missing is not None:
        raise DataError(
            f"{path}: lists the shard {missing!r}, which is not among the {len(shards)} given. Copy it too, or leave such "
            "indexes aside with --ignore-other-indexes"
        )
    numbered = {name: (number, count) for number, (name, count) in enumerate(counts.items())}
    return Energon(folder=path.parent, counts=numbered, root=root)


def check_offsets(shard: Path, members: Members, samples: Samples) -> list[tuple[str, str]]:
    """(index, difference) where the shard's `.tar.idx` disagrees; the first only."""
    path = Path(f"{shard}.idx")
    if not path.is_file():
        return []
    if path.stat().st_size > 8 * (len(samples.keys) + 1) or path.stat().st_size % 8:
        return [(str(path), f"has {path.stat().st_size} bytes; {len(samples.keys)} samples need 8 each and 8 more")]
    listed = np.frombuffer(path.read_bytes(), dtype="<u8")
    starts = np.array([members.starts[min(part.values())] for part in samples.parts], dtype=np.uint64)
    if len(listed) not in (len(starts), len(starts) + 1):
        return [(str(path), f"lists {len(listed)} offsets, the shard has {len(starts)} samples")]
    differing = np.flatnonzero(listed[: len(starts)] != starts)
    if len(differing):
        first = int(differing[0])
        return [(str(path), f"puts sample {first} at byte {listed[first]}, the shard has it at {starts[first]}")]
    if len(listed) > len(starts) and not (int(starts[-1]) if len(starts) else 0) <= listed[-1] <= members.size_bytes:
        return [(str(path), f"ends at byte {listed[-1]}, the shard has {members.size_bytes}")]
    return []


def check_energon(energon: Energon, shard: Path, members: Members, samples: Samples) -> list[tuple[str, str]]:
    """(index, difference) where counts or database disagree with a shard; the first only.

    Raises:
        DataError: the database cannot be read.
    """
    entry = energon.counts.get(shard.relative_to(energon.root).as_posix())
    if entry is None:
        return [(str(energon.folder / ".info.json"), "does not list this shard")]
    number, count = entry
    if count != len(samples.keys):
        return [(str(energon.folder / ".info.json"), f"says {count} samples, the shard has {len(samples.keys)}")]
    if not energon.database.is_file():
        return []
    difference = _compare(energon.database, number, members, samples)
    return [(str(energon.database), difference)] if difference else []


def _compare(path: Path, number: int, members: Members, samples: Samples) -> str | None:
    parts = sum(len(part) for part in samples.parts)
    keys = _rows(path, "SELECT sample_index, sample_key, byte_offset FROM samples", number, limit=len(samples.keys) + 1)
    found = _rows(
        path,
        "SELECT sample_index, part_name, content_byte_offset, content_byte_size FROM sample_parts",
        number,
        limit=parts + 1,
    )
    expected_keys = [
        (i, key, members.starts[min(part.values())]) for i, (key, part) in enumerate(zip(samples.keys, samples.parts))
    ]
    expected = sorted(
        (i, members.offsets[m], members.sizes[m], name)
        for i, part in enumerate(samples.parts)
        for name, m in part.items()
    )
    if sorted(keys) != expected_keys:
        odd = next((row for row in keys if row not in set(expected_keys)), "fewer")
        return f"lists other samples: {odd!r}, the shard has {len(expected_keys)}"
    given = sorted((i, offset, size, str(name).lower()) for i, name, offset, size in found)
    # An older database may hold samples only.
    if found and given != expected:
        odd_part = next((row for row in given if row not in set(expected)), "fewer")
        return f"lists other members: {odd_part!r} (sample, offset, size, name), the shard has {len(expected)}"
    return None


def _rows(path: Path, query: str, number: int, *, limit: int) -> list[tuple[Any, ...]]:
    try:
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
        try:
            kinds = dict(connection.execute("SELECT name, type FROM sqlite_master WHERE name IN (?, ?)", _TABLES))
            table = query.rpartition(" ")[2]
            if table == "sample_parts" and table not in kinds:
                return []
            if kinds.get(table) != "table":  # a view could compute for ever
                raise DataError(f"{path}: has no table {table!r}: no Energon index")
            _confine(connection, budget=_STEPS_PER_ROW * (limit + 1000))
            rows = connection.execute(f"{query} WHERE tar_file_id = ? LIMIT ?", (number, limit)).fetchall()
        finally:
            connection.close()
    except (sqlite3.Error, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as an Energon index: {error}") from None
    columns = (int, str, int, int)
    if not all(isinstance(value, kind) for row in rows for value, kind in zip(row, columns)):
        raise DataError(f"{path}: table {table!r} holds values of other types than Energon writes")
    return rows


def _confine(connection: sqlite3.Connection, *, budget: int) -> None:
    left = [budget]

    def spend() -> int:
        left[0] -= 100_000
        return left[0] < 0

    if hasattr(connection, "setlimit"):  # from Python 3.11 on
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
    connection.set_progress_handler(spend, 100_000)
    connection.set_authorizer(
        lambda action, table, *_: (
            sqlite3.SQLITE_OK
            if action in _ALLOWED and (table is None or table in (*_TABLES, ""))
            else sqlite3.SQLITE_DENY
        )
    )
