"""Whose checkpoint is it: one that another user owns is refused, one that others may write is warned about. Reads no content."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dstrain.base.errors import CheckpointError
from dstrain.base.logs import get_logger

_LOG = get_logger(__name__)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_warned: set[str] = set()


def check_owner(folder: Path, names: list[str]) -> None:
    """Look at a checkpoint's folder and files before anything in them is believed.

    Args:
        folder: of the checkpoint.
        names: files in it; missing ones are left to whoever reads them.

    Raises:
        CheckpointError: one belongs to neither this user nor root.
    """
    for path in (folder, *(folder / name for name in names)):
        try:
            found = path.stat()
        except OSError:
            continue
        if found.st_uid not in (os.geteuid(), 0):
            raise CheckpointError(
                f"{path}: belongs to user {found.st_uid}, not to you ({os.geteuid()}) or root: have it copied by you, "
                "or set checkpoint.trust_owner: true if you trust that user"
            )
        if found.st_mode & _WRITABLE_BY_OTHERS and str(folder) not in _warned:
            _warned.add(str(folder))
            _LOG.warning(
                "%s: other users may write here (mode %o): chmod -R go-w it", path, stat.S_IMODE(found.st_mode)
            )
