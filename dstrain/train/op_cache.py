"""Stale locks in torch's cache of compiled ops: found, cleared where that is safe, and said.

A process killed while it compiles an op leaves a `lock` file behind, and every later process that wants the op waits for it
for ever without a word (docs/deepspeed.md). dstrain builds no op by default, so it never waits; a raw `deepspeed:`
key may still ask for one, and other programs share the cache.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from dstrain.base.logs import get_logger

_LOG = get_logger(__name__)

STALE_AFTER_S = 600.0
"""Age from which a lock that no local process holds is removed; compiling an op takes one or two minutes."""


def cache_folder() -> Path:
    """Where torch keeps compiled ops (TORCH_EXTENSIONS_DIR or the default below the user's cache folder)."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"


def clear_stale_locks(folder: Path | None = None, *, stale_after_s: float = STALE_AFTER_S) -> list[Path]:
    """Remove locks that are old and held by no process of this host; name young ones.

    Args:
        folder: the cache; default: torch's.
        stale_after_s: a cache may be shared between hosts, whose processes cannot be seen: only age tells there.

    Returns:
        The locks removed.
    """
    removed: list[Path] = []
    for lock, age_s in unheld_locks(folder):
        if age_s < stale_after_s:
            _LOG.warning(
                "compiled-op cache: %s is %.0f s old and no process here holds it; not waited for", lock, age_s
            )
            continue
        try:
            lock.unlink()
        except OSError:
            continue
        removed.append(lock)
        _LOG.warning("compiled-op cache: removed %s, left %.0f minutes ago by a killed build", lock, age_s / 60)
    return removed


def unheld_locks(folder: Path | None = None) -> list[tuple[Path, float]]:
    """Locks that no process of this host holds, with their age in seconds.

    Args:
        folder: the cache; default: torch's.
    """
    found: list[tuple[Path, float]] = []
    root = folder if folder is not None else cache_folder()
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age_s = time.time() - lock.stat().st_mtime
        except OSError:
            continue
        if not _held_locally(lock):
            found.append((lock, age_s))
    return found


def _held_locally(lock: Path) -> bool:
    """Whether a process of this host has the file open: torch's baton keeps it open while it compiles."""
    target = str(lock.resolve())
    for links in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(link) == target for link in links.iterdir()):
                return True
        except OSError:
            continue
    return False
