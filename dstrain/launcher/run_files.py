"""What the supervisor reads and moves in a run folder: progress, exit files of earlier attempts, a checkpoint set aside.

Deletes nothing and opens no tensor: a published checkpoint counts by its name, which it got only after verification.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.storage import publish_directory
from dstrain.checkpoint.layout import checkpoints_folder, published_steps, step_folder
from dstrain.health.outcomes import FOLDER
from dstrain.launcher.outcome import read_exits

LOGS = "logs"
EVENTS = "events.jsonl"
_TAIL_BYTES = 256 << 10


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    checkpoint: int
    """Step of the newest checkpoint; -1 for none."""
    num_checkpoints: int
    reached: int
    """Highest step that events or exit files speak of; -1 for none."""


def progress_of(run_folder: Path) -> Progress:
    """Look at the run folder; a new one has made none."""
    steps = [step for step, _ in published_steps(checkpoints_folder(run_folder))]
    newest = steps[0] if steps else -1
    said = [left.step for left in read_exits(run_folder) if left.step is not None]
    return Progress(newest, len(steps), max([newest, _last_step(run_folder), *said]))


def last_events(run_folder: Path, *, tail_bytes: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """Events from the end of the file, in order; a run of weeks has too many lines to read all."""
    path = run_folder / EVENTS
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tail_bytes))
            lines = file.read(tail_bytes).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # cut by our own window, or torn by a crash
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
    return found


def _last_step(run_folder: Path) -> int:
    steps = [event.get("step") for event in last_events(run_folder) if event["event"] == "step"]
    return max((step for step in steps if isinstance(step, int)), default=-1)


def put_exits_away(run_folder: Path, *, before_attempt: int) -> None:
    """Move the last attempt's exit files into the logs, so that none is taken for a word of the next.

    Raises:
        StorageError: they cannot be moved.
    """
    if (run_folder / FOLDER).is_dir():
        publish_directory(
            run_folder / FOLDER, _free_name(run_folder / LOGS / f"exit-before-attempt-{before_attempt:04d}")
        )


def set_newest_aside(run_folder: Path) -> tuple[Path, int]:
    """Take the newest checkpoint out of the way by renaming it; returns its new place and its step.

    Raises:
        StorageError: it cannot be renamed.
    """
    step, path = published_steps(checkpoints_folder(run_folder))[0]
    aside = _free_name(path.with_name(f"set-aside-{path.name}"))
    publish_directory(path, aside)
    return aside, step


def put_back(run_folder: Path, aside: Path, step: int) -> bool:
    """Give a checkpoint its name back, unless the run has written that step again; returns whether it did.

    Raises:
        StorageError: it cannot be renamed.
    """
    place = step_folder(checkpoints_folder(run_folder), step)
    if place.exists():
        return False
    publish_directory(aside, place)
    return True


def _free_name(path: Path) -> Path:
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 1 << 20))
    return next(name for name in names if not name.exists())
