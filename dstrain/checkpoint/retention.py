"""Which checkpoints stay: the newest k, milestones, the protected, and always the newest one that was read back whole.

A checkpoint counts when its manifest checks and its files have their sizes; it counts as verified when its bytes were read
from the disk again and hashed, by its writer (the manifest says so) or since. Damaged ones are kept for inspection and count as nothing.
Deletes by renaming away first. Knows no clock: order is the step's.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.errors import CheckpointError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import remove_directory, rename
from dstrain.checkpoint.layout import published_steps, superseded
from dstrain.checkpoint.reader import Checkpoint

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Kept:
    """What retention keeps besides the newest that is verified."""

    last: int
    """Newest checkpoints."""
    every: int | None = None
    """Steps that are a multiple of this stay for good."""


def steps_to_delete(
    steps: Collection[int],
    *,
    kept: Kept,
    protect: Collection[int] = (),
    verified: Collection[int] = (),
    coming: int = 0,
) -> list[int]:
    """Steps that retention removes, oldest first.

    Args:
        steps: of the checkpoints that count.
        kept: the rule.
        protect: never removed (the best).
        verified: steps known to be whole; the newest of them is never removed.
        coming: checkpoints about to be published that count among the newest: room is made for them. At least one stays.
    """
    newest = sorted(steps, reverse=True)[: max(1, kept.last - coming)]
    safe = max((step for step in steps if step in set(verified)), default=None)

    def stays(step: int) -> bool:
        milestone = kept.every is not None and step > 0 and step % kept.every == 0
        return step in newest or step in protect or step == safe or milestone

    return sorted(step for step in steps if not stays(step))


class Retention:
    """Applies the rule to one folder."""

    def __init__(self, folder: Path, *, kept: Kept, trust_owner: bool = False) -> None:
        self._folder, self._kept, self._trust_owner = folder, kept, trust_owner
        self._verified: set[int] = set()

    def note_verified(self, step: int) -> None:
        """This step's bytes were read and hashed, e.g. by `newest_valid` at the start."""
        self._verified.add(step)

    def apply(self, *, protect: Collection[int] = ()) -> list[int]:
        """Delete what the rule does not keep, and what a rollback has set aside.

        Returns:
            The steps deleted.
        """
        for _, path in superseded(self._folder):
            _remove(path)
        return self._delete(protect, coming=0)

    def make_room(self, step: int, *, protect: Collection[int] = ()) -> list[int]:
        """Delete, before a step's checkpoint is in place, what would be deleted once it is.

        Args:
            step: the one that needs room; should it be there already (a rename that was done but told as failed), it does
                not count, as it may not be durable.
            protect: never removed (the best).

        Returns:
            The steps deleted; empty when there is nothing that may go.
        """
        set_aside = [found for found, path in superseded(self._folder) if _remove(path)]
        return sorted([*set_aside, *self._delete(protect, coming=1, ignore=step)])

    def _delete(self, protect: Collection[int], *, coming: int, ignore: int = -1) -> list[int]:
        counted: dict[int, Path] = {}
        verified = set(self._verified)
        for step, path in published_steps(self._folder):
            if step == ignore:
                continue
            try:
                checkpoint = Checkpoint(path, trust_owner=self._trust_owner)
            except CheckpointError:
                continue
            counted[step] = path
            if checkpoint.manifest.read_back:
                verified.add(step)
        doomed = steps_to_delete(counted, kept=self._kept, protect=protect, verified=verified, coming=coming)
        return [step for step in doomed if _remove(counted[step])]


def set_aside_newer(folder: Path, step: int) -> list[int]:
    """After a rollback to `step`: take the name of a checkpoint from every newer one, so that no restart goes on from them.

    Retention deletes them after the next save.

    Returns:
        The steps set aside, newest first.

    Raises:
        StorageError: one cannot be renamed.
    """
    newer = [(found, path) for found, path in published_steps(folder) if found > step]
    for _, path in newer:
        rename(path, path.with_name(f"superseded-{path.name}-{uuid.uuid4().hex[:8]}"))
    return [found for found, _ in newer]


def _remove(path: Path) -> bool:
    try:
        remove_directory(path)
    except StorageError as error:
        _LOG.warning("old checkpoint not removed: %s", error)
        return False
    return True
