"""Is there room for a checkpoint, and on each host for temporary files: free space and inodes against what is needed.

A save writes a whole new checkpoint before an old one goes, so room for one more is needed at all times. What quotas leave,
the kernel does not say. Judging is pure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.errors import ExitCode
from dstrain.health.sanity_findings import Finding, about

BYTES_PER_PARAMETER = 12
"""fp32 weight and Adam's two moments (docs/checkpoints.md)."""
SMALL_FILES = 1 << 20
"""Manifest, tokenizer and configuration, generously."""
SCRATCH_BYTES = 256 << 20
"""For temporary files, compiled kernels and sockets' buffers."""
_INODES = 256


@dataclass(frozen=True)
class Room:
    """What a file system has left for this user."""

    path: str
    free_bytes: int
    free_inodes: int
    """-1 where the file system has no fixed number."""


def room_at(path: Path) -> Room | None:
    """The room where a path lies or will lie; None when nothing of it exists or can be asked."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError:
        return None
    return Room(str(path), found.f_bavail * found.f_frsize, found.f_favail if found.f_files else -1)


def bytes_of_a_save(num_parameters: int) -> int:
    """What a checkpoint takes, over all ranks."""
    return BYTES_PER_PARAMETER * num_parameters + SMALL_FILES


def judge_room(rooms: Mapping[str, Room | None], *, needed_bytes: int, keep: int) -> list[Finding]:
    """Of places that all ranks share.

    Args:
        rooms: by the key of the configuration that names the place.
        needed_bytes: of one checkpoint; 0 when it is not known.
        keep: how many are kept, besides the one being written.
    """
    findings = []
    for key, room in rooms.items():
        if room is None:
            findings.append(Finding("disk", "skipped", f"{key}: the room cannot be asked for"))
            continue
        text = f"{key} has {_size(room.free_bytes)} free"
        text += f", a checkpoint takes {_size(needed_bytes)}" if needed_bytes else ""
        if room.free_bytes < needed_bytes or 0 <= room.free_inodes < _INODES:
            if room.free_bytes >= needed_bytes:
                text = f"{key} has {room.free_inodes} files left on its disk"
            findings.append(
                Finding(
                    "disk",
                    "failed",
                    f"{text} ({room.path})",
                    f"make room there, or set {key} to another disk",
                    code=int(ExitCode.RETRY_HERE),
                )
            )
        elif room.free_bytes < (keep + 1) * needed_bytes:
            fix = f"{keep} are kept and one more is written before the oldest goes; make room, or lower checkpoint.keep_last"
            findings.append(Finding("disk", "warning", f"{text} ({room.path})", fix))
        else:
            findings.append(Finding("disk", "ok", text))
    return findings


def judge_scratch(rooms: Sequence[Room | None], hosts: Sequence[str], *, name: str, needed_bytes: int) -> list[Finding]:
    """Of a folder that each host has for itself; silent where there is enough.

    Args:
        rooms: of rank 0, 1, ...; None for ranks that leave it to the first one of their host.
        hosts: of rank 0, 1, ...
        name: of the folder, for people.
        needed_bytes: on each host.
    """
    short = tuple(rank for rank, room in enumerate(rooms) if room is not None and room.free_bytes < needed_bytes)
    if not short:
        return []
    least = min(room.free_bytes for room in rooms if room is not None)
    text = f"{name} of {about(short, hosts)} has {_size(least)} free, {_size(needed_bytes)} are wanted"
    fix = "remove what earlier jobs have left there, or set TMPDIR (data: storage.cache_dir) to a larger disk"
    return [Finding("disk", "warning", text, fix, ranks=short, hosts=tuple(hosts[rank] for rank in short))]


def _size(value: int) -> str:
    number = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
