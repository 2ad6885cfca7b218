"""How ranks tell rank 0 that their file is written: a small JSON file each, beside the staging folder. No collectives.

Background threads may not enter collectives, which belong to the training's order; a file needs no order. A report carries the
save's nonce, so that what an earlier save left is never taken for this one's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError, StorageError
from dstrain.base.storage import read_json, write_json
from dstrain.checkpoint.layout import reports_folder
from dstrain.checkpoint.rank_file import Part

_AGAIN = "again.json"


def write_report(
    staging: Path, nonce: str, rank: int, attempt: int, part: Part | None, *, error: str = "", full: bool = False
) -> None:
    """Say that this rank's file is durable, or why not.

    Args:
        staging: folder of the save.
        nonce: of the save.
        rank: this one.
        attempt: 1, or 2 after room was made.
        part: what was written; None on failure.
        error: why it failed.
        full: whether making room may help.

    Raises:
        StorageError: the report cannot be written; rank 0 learns of this rank at the next agreement or by its deadline.
    """
    fields = {} if part is None else {
        "name": part.name, "size_bytes": part.size_bytes, "sha256": part.sha256, "read_back": part.read_back,
        "fragments": [list(f) for f in part.fragments],
    }  # fmt: skip
    write_json(_path(staging, rank, attempt), {"nonce": nonce, "rank": rank, "error": error, "full": full, **fields})


def read_report(staging: Path, nonce: str, rank: int, attempt: int) -> dict[str, Any] | None:
    """A rank's report of this save, or None while there is none."""
    try:
        report = read_json(_path(staging, rank, attempt))
    except DataError:
        return None
    return report if isinstance(report, dict) and report.get("nonce") == nonce else None


def part_of(report: dict[str, Any]) -> Part:
    """The file that a report vouches for."""
    fragments = tuple((str(n), str(s), int(o), int(c)) for n, s, o, c in report["fragments"])
    return Part(
        str(report["name"]), int(report["size_bytes"]), str(report["sha256"]), fragments, bool(report["read_back"])
    )


def ask_again(staging: Path, nonce: str) -> None:
    """Rank 0: room was made, whoever found none may try once more."""
    write_json(reports_folder(staging) / _AGAIN, {"nonce": nonce})


def asked_again(staging: Path, nonce: str) -> bool:
    """Whether rank 0 has made room."""
    try:
        found = read_json(reports_folder(staging) / _AGAIN)
    except DataError:
        return False
    return isinstance(found, dict) and found.get("nonce") == nonce


class Collector:
    """Rank 0's wait for everybody's report."""

    def __init__(self, staging: Path, nonce: str, world_size: int) -> None:
        self._staging, self._nonce = staging, nonce
        self.missing = {rank: 1 for rank in range(1, world_size)}
        """Ranks not heard of yet, and the attempt that is waited for."""
        self.parts: dict[int, Part] = {}

    def look(self, make_room: Callable[[], bool]) -> None:
        """Take in what has arrived.

        Args:
            make_room: called when a rank has no room; True when something was deleted.

        Raises:
            StorageError: a rank has failed, by its own words.
        """
        for rank, attempt in sorted(self.missing.items()):
            report = read_report(self._staging, self._nonce, rank, attempt)
            if report is None:
                continue
            if not report["error"]:
                self.parts[rank] = part_of(report)
                del self.missing[rank]
            elif report["full"] and attempt == 1 and (asked_again(self._staging, self._nonce) or make_room()):
                ask_again(self._staging, self._nonce)
                self.missing[rank] = 2
            else:
                raise StorageError(f"rank {rank}: {report['error']}")


def _path(staging: Path, rank: int, attempt: int) -> Path:
    return reports_folder(staging) / f"rank-{rank:05d}-{attempt}.json"
