"""Run folders are their owner's: new files and folders are made private, and a place where anybody can swap them is refused.

Who wants to share a run gives rights to it afterwards (`chmod -R g+rX`); nothing here takes rights away from what exists.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dstrain.base.errors import ConfigError

PRIVATE_UMASK = 0o077


def make_private(run_folder: Path) -> None:
    """Make what this process writes from now on readable by its owner only; check where the run folder is to lie.

    Call it before anything is written.

    Raises:
        ConfigError: other users could replace the run folder or its content.
    """
    os.umask(PRIVATE_UMASK)
    check_place(run_folder)


def check_place(run_folder: Path) -> None:
    """Refuse a run folder that cannot be written to, or that any user of the machine could replace.

    Raises:
        ConfigError: a part of its path is a file or may not be written to; or the folder itself, or the one it would be
            made in, may be written by everybody and is not sticky, as /tmp is.
    """
    place = Path(os.path.realpath(run_folder))
    nearest = next(p for p in (place, *place.parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"run_folder: {run_folder}: {nearest} is a file: choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run_folder: {run_folder}: you may not write into {nearest}: choose another folder")
    checked = [place, place.parent] if place.exists() else [nearest]
    for folder in checked:
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ConfigError(
                f"run_folder: {run_folder}: every user of this machine may write into {folder} (mode {stat.S_IMODE(mode):o}) "
                f"and so swap the run's files: chmod o-w {folder}, or choose another place"
            )
