"""What a folder lies on: file system, device or server, and mount point, as the kernel lists them. Asks no server."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_LIST = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """One mounted file system."""

    kind: str
    """As the kernel calls it: ext4, nfs4, lustre, ..."""
    source: str
    """Device or server."""
    point: str

    def __str__(self) -> str:
        return f"{self.kind} from {self.source} at {self.point}"


UNKNOWN = Mount("unknown", "unknown", "/")


def mount_of(folder: Path, *, mounts: str | None = None) -> Mount:
    """What a folder lies on; `UNKNOWN` where that cannot be told.

    Args:
        folder: may not exist yet; links are followed.
        mounts: the text of /proc/self/mountinfo (`proc(5)`); default: this machine's.
    """
    text = _read() if mounts is None else mounts
    real = Path(os.path.realpath(folder))
    best, longest = UNKNOWN, -1
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if not dash or len(fields) < 5 or len(after) < 2:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])  # blanks are written \040
        if real.is_relative_to(point) and len(point) >= longest:  # the last of equal ones hides those before
            best, longest = Mount(after[0], after[1], point), len(point)
    return best


def _read() -> str:
    try:
        return _LIST.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
