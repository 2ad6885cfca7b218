"""Does every host see the run folder that rank 0 writes to, and rank 0 what they write: tried with small files, then removed.

A network file system answers from its caches for a while: each look is preceded by making and removing a file in the folder,
after which the client asks the server about the folder again (RFC 1813, weak cache consistency; `nfs(5)`, "Directory
entry caching"). One rank of each host looks. Judging is pure.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ExitCode, StorageError
from dstrain.base.mounts import Mount, mount_of
from dstrain.base.storage import make_directory
from dstrain.health.sanity_findings import Finding, about

PREFIX = ".start-check-"
_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs", "vfat"})


@dataclass(frozen=True)
class Look:
    """What one host saw."""

    sees: bool
    waited_s: float
    mount: Mount
    error: str = ""
    """Why it could not write."""


def look_at_folder(control: ControlPlane, folder: Path, *, patience_s: float) -> list[Look | None]:
    """Collective. Try the folder from every host; what was made for it is removed.

    Args:
        control: agreements between ranks.
        folder: as this rank knows it.
        patience_s: seconds that a file may take to appear.

    Returns:
        Of rank 0, 1, ...; None for ranks that leave it to the first one of their host.

    Raises:
        StorageError: rank 0 cannot write there (PeerError on the others).
    """
    world = control.world
    token = str(control.from_first(uuid.uuid4().hex[:12]))
    place = folder / f"{PREFIX}{token}"
    try:
        control.together(lambda: _begin(place, token) if world.is_first else None)
        own = _look(folder, place, token, rank=world.rank, patience_s=patience_s) if world.local_rank == 0 else None
        gathered = control.gather_json(None if own is None else asdict(own))
        looks = [None if one is None else Look(**{**one, "mount": Mount(**one["mount"])}) for one in gathered]
        wrote = [rank for rank, look in enumerate(looks) if look is not None and look.sees and not look.error and rank]
        unseen = control.from_first(_unseen(place, wrote, patience_s=patience_s) if world.is_first else [])
        return [
            look if look is None or rank not in unseen else Look(False, look.waited_s, look.mount, "not seen by rank 0")
            for rank, look in enumerate(looks)
        ]
    finally:
        if world.is_first:
            shutil.rmtree(place, ignore_errors=True)


def judge_folder(looks: Sequence[Look | None], hosts: Sequence[str], *, folder: Path) -> Finding:
    """Name the hosts that do not share the folder.

    Args:
        looks: of rank 0, 1, ...; rank 0's is never None.
        hosts: of rank 0, 1, ...
        folder: as rank 0 knows it.
    """
    first = looks[0]
    assert first is not None, "rank 0 is the first of its host"
    seen = {rank: look for rank, look in enumerate(looks) if look is not None}
    blind = tuple(rank for rank, look in seen.items() if not look.sees or look.error)
    if not blind:
        slowest = max(look.waited_s for look in seen.values())
        late = f", after {slowest:.1f} s" if slowest > 0.5 else ""
        return Finding("shared folder", "ok", f"seen by {len(seen)} host{'s' if len(seen) > 1 else ''}{late}")
    mounts = {seen[rank].mount for rank in blind}
    own_disks = mounts == {first.mount} and first.mount.kind in _LOCAL
    where = tuple(hosts[rank] for rank in blind)
    look = seen[blind[0]]
    if own_disks:
        return Finding(
            "shared folder", "failed",
            f"run_folder {folder} is on a disk of each host's own ({first.mount}): {about(blind, hosts)} cannot see what "
            f"rank 0 on {hosts[0]} writes",
            "set run_folder to a folder on a file system that all hosts share", code=int(ExitCode.BAD_INPUT),
        )  # fmt: skip
    if look.sees:
        text = f"{about(blind, hosts)} cannot write to run_folder {folder} ({look.error})"
        fix = "check its owner and rights, and that the file system is not mounted read-only there"
    else:
        text = (
            f"{about(blind, hosts)} does not see what rank 0 on {hosts[0]} writes to run_folder {folder}, for "
            f"{look.waited_s:.1f} s (there: {look.mount}; rank 0: {first.mount})"
        )
        fix = "mount the shared file system on that host, or leave the host out; slow caches: start.shared_folder_s"
    return Finding("shared folder", "failed", text, fix, ranks=blind, hosts=where)


def _begin(place: Path, token: str) -> None:
    make_directory(place)
    try:
        (place / "0").write_text(token, encoding="ascii")
    except OSError as error:
        raise StorageError(f"{place.parent}: rank 0 cannot write there: {error.strerror or error}") from None


def _look(folder: Path, place: Path, token: str, *, rank: int, patience_s: float) -> Look:
    started = time.monotonic()
    mount = mount_of(folder)
    pause = _PAUSE_S
    while not _reads(place / "0", token):
        if time.monotonic() - started >= patience_s:
            return Look(False, time.monotonic() - started, mount)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
        _refresh(folder, f"{PREFIX}{token}-{rank}")
    waited = time.monotonic() - started
    try:
        if rank:
            (place / str(rank)).write_text(token, encoding="ascii")
    except OSError as error:
        return Look(True, waited, mount, error.strerror or str(error))
    return Look(True, waited, mount)


def _unseen(place: Path, ranks: Sequence[int], *, patience_s: float) -> list[int]:
    """Rank 0. Whose files do not appear."""
    deadline = time.monotonic() + patience_s
    left = [rank for rank in ranks if not (place / str(rank)).exists()]
    while left and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        _refresh(place, "again")
        left = [rank for rank in left if not (place / str(rank)).exists()]
    return left


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == token
    except (OSError, UnicodeDecodeError):
        return False


def _refresh(folder: Path, name: str) -> None:
    """Change the folder, so that the client of a network file system forgets what it has cached of it."""
    try:
        (folder / name).touch()
        (folder / name).unlink()
    except OSError:
        return
