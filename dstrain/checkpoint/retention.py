"""Which checkpoints stay: the newest k and those protected; never the last valid one. Deletes by renaming away first."""

from __future__ import annotations

from pathlib import Path

from dstrain.base.errors import CheckpointError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import remove_directory
from dstrain.checkpoint.layout import published_steps
from dstrain.checkpoint.manifest import read_manifest

_LOG = get_logger(__name__)


def steps_to_delete(steps: list[int], *, keep_last: int, protect: frozenset[int]) -> list[int]:
    """Steps that retention removes, oldest first: all but the newest `keep_last` and the protected."""
    newest = sorted(steps, reverse=True)[:keep_last]
    return sorted(step for step in steps if step not in newest and step not in protect)


def keep_newest(folder: Path, *, keep_last: int, protect: frozenset[int] = frozenset()) -> list[int]:
    """Delete old checkpoints; damaged ones are kept for inspection and do not count as kept.

    Returns:
        The steps deleted.
    """
    valid: dict[int, Path] = {}
    for step, path in published_steps(folder):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        valid[step] = path
    doomed = steps_to_delete(list(valid), keep_last=keep_last, protect=protect)
    for step in doomed:
        try:
            remove_directory(valid[step])
        except StorageError as error:
            _LOG.warning("old checkpoint not removed: %s", error)
    return doomed
