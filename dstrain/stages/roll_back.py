"""Going back after the guards asked for it: to which checkpoint, and a record of it that survives a crash.

`roll-backs.json` in the run folder holds the windows of data that were stepped over. A checkpoint that was written after a
roll-back knows its window itself; the record is for the time before the first such checkpoint, in which a restart would
else train on the same data again. Loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dstrain.base.errors import CheckpointError, NoProgressError
from dstrain.base.storage import read_json, write_json
from dstrain.checkpoint.reader import newest_valid
from dstrain.checkpoint.writer import CheckpointWriter
from dstrain.health.guards import RollBack

FILE_NAME = "roll-backs.json"


@dataclass(frozen=True)
class Window:
    """One roll-back."""

    step: int
    """Steps done by the checkpoint that was gone back to."""
    first: int
    """First step whose data is stepped over."""
    last: int
    """One past the last one."""
    reason: str


def read_windows(run_folder: Path) -> list[Window]:
    """The roll-backs of a run, in order.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = run_folder / FILE_NAME
    if not path.exists():
        return []
    data = read_json(path)
    try:
        return [Window(int(w["step"]), int(w["first"]), int(w["last"]), str(w["reason"])) for w in data]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: not a record of roll-backs: restore it, or delete it to train on the data that was stepped over"
        ) from None


def windows_missing(windows: Sequence[Window], *, step: int) -> list[Window]:
    """Those that a checkpoint of `step` steps cannot know, because they were decided after it was written."""
    return [window for window in windows if window.step >= step]


def go_back(run_folder: Path, writer: CheckpointWriter, wanted: RollBack, *, reason: str) -> Window:
    """Choose the checkpoint, put newer ones aside and note the window. Rank 0 only, while nothing is being saved.

    Newer ones go first: a crash in between resumes from the older state without the note, meets the same trouble, and goes
    back again.

    Raises:
        NoProgressError: no checkpoint is older than the trouble.
        StorageError: the disk does not take the changes.
    """
    found = newest_valid(writer.folder, before_step=wanted.before + 1, mirror=writer.mirror).checkpoint
    found = found or newest_valid(writer.folder, before_step=wanted.onset + 1).checkpoint
    if found is None:
        raise NoProgressError(
            f"{reason}, and there is no checkpoint from before step {wanted.onset} to go back to: lower "
            "optimizer.learning_rate, lengthen schedule.warmup_steps, save more often, or set train.guards.loss_spike: skip"
        )
    step = found.manifest.step
    window = Window(step, max(wanted.first, step), wanted.last, reason)
    writer.roll_back(step)
    write_json(run_folder / FILE_NAME, [asdict(w) for w in [*read_windows(run_folder), window]])
    return window
