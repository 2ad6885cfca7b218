"""Indexes that other programs left beside the shards, held against the shards themselves.

wids shard lists, DALI `.idx` files and Energon's `.tar.idx` and `.nv-meta` are read as plain data (never Energon's
Python or YAML) and compared with what the walk over the tar found: names, places, sizes, counts, MD5. They save no
reading, because every byte is read for its checksum anyway, but they tell when a shard is not the one that was meant.
A disagreement is a `DataError` that names both files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.base.errors import DataError
from dstrain.foreign.importers_dali import check_dali, find_dali
from dstrain.foreign.importers_energon import Energon, check_energon, check_offsets, find_energon
from dstrain.foreign.importers_wids import WidsShard, find_wids
from dstrain.foreign.samples import Samples
from dstrain.foreign.tar_walk import Members

OFF_HINT = "Make that index again, or leave such indexes aside with --ignore-other-indexes"


@dataclass(frozen=True)
class FoundIndexes:
    """What other programs say about a set of shards."""

    search: bool = True
    """Whether to look beside the shards at all."""
    wids: dict[Path, WidsShard] = field(default_factory=dict)
    """Shard to its entry in a wids list."""
    energon: Energon | None = None
    """Energon's metadata folder."""
    names: tuple[str, ...] = ()
    """Files found, for the log."""

    def check_digest(self, shard: Path) -> None:
        """Compare a shard's MD5 with the wids list's, if that has one.

        Raises:
            DataError: they differ.
        """
        entry = self.wids.get(shard)
        if entry is None or entry.md5 is None:
            return
        digest = hashlib.md5(usedforsecurity=False)
        with open(shard, "rb") as file:
            while data := file.read(8 << 20):
                digest.update(data)
        if digest.hexdigest() != entry.md5.lower():
            raise DataError(f"{shard}: its MD5 is {digest.hexdigest()}, {entry.source} says {entry.md5}. {OFF_HINT}")


def find_indexes(root: Path, shards: Sequence[Path], *, wids: Path | None, search: bool) -> FoundIndexes:
    """Look for other programs' indexes.

    Args:
        root: the folder the shards lie under.
        shards: the tars.
        wids: a wids list named by the user.
        search: False uses nothing but `wids`.

    Raises:
        DataError: an index cannot be read, or lists a shard that is not there.
    """
    listed, wids_names = find_wids(root, shards, named=wids, search=search)
    energon = find_energon(root, shards) if search else None
    names = [*wids_names, *([str(energon.folder)] if energon is not None else [])]
    if search:
        names += [str(path) for shard in shards if (path := find_dali(shard)) is not None]
    return FoundIndexes(search=search, wids=listed, energon=energon, names=tuple(names))


def check_shard(found: FoundIndexes, shard: Path, members: Members, samples: Samples) -> None:
    """Hold one shard against all that was found.

    Raises:
        DataError: an index disagrees; names shard, index and the difference.
    """
    problems: list[tuple[str, str]] = []
    entry = found.wids.get(shard)
    if entry is not None:
        if entry.size_bytes is not None and entry.size_bytes != members.size_bytes:
            problems.append((entry.source, f"says {entry.size_bytes} bytes, the shard has {members.size_bytes}"))
        if entry.num_samples is not None and entry.num_samples != len(samples.keys):
            problems.append((entry.source, f"says {entry.num_samples} samples, the shard has {len(samples.keys)}"))
    if found.search:
        dali = find_dali(shard)
        problems += check_dali(dali, members, samples) if dali is not None else []
        problems += check_offsets(shard, members, samples)
    if found.energon is not None:
        problems += check_energon(found.energon, shard, members, samples)
    if problems:
        source, difference = problems[0]
        raise DataError(f"{shard}: disagrees with {source}, which {difference}. {OFF_HINT}")
