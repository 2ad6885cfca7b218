"""The scratch folder of a build, shared by all its tasks: a marker for every finished task, beside what tasks wrote.

A marker is a small JSON file named by the hash of all that decides the task's result, written whole after the result is
durable. So a task that was killed has no marker and runs again, a finished one never does, and a task whose inputs or
settings changed has another name. Two processes that run the same task by accident write apart and name equal content.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError
from dstrain.base.storage import make_directory, read_json, remove_directory, write_text
from dstrain.health.lease import RunLease


@dataclass(frozen=True)
class WorkFolder:
    """Markers and scratch data of one output."""

    path: Path

    @classmethod
    def beside(cls, out: Path) -> WorkFolder:
        """The folder of a build of `out`, on the same file system, so that shards can be published by a rename."""
        return cls(out.parent / f".work-{out.name}")

    def create(self) -> None:
        """Make it, with a word for whoever finds it."""
        make_directory(self.path / "done")
        make_directory(self.path / "data")
        note = self.path / "README"
        if not note.exists():
            write_text(
                note,
                "Scratch data of an unfinished `dstrain shards build`. The same command goes on from here;\n"
                "without that, this folder can be deleted.\n",
            )

    def done(self) -> set[str]:
        """Names of all finished tasks."""
        folder = self.path / "done"
        return {path.stem for path in folder.glob("*.json")} if folder.is_dir() else set()

    def __contains__(self, name: str) -> bool:
        """Whether a task is finished."""
        return (self.path / "done" / f"{name}.json").exists()

    def complete(self, name: str, result: dict[str, Any]) -> None:
        """Mark a task as finished; its data must be durable already."""
        write_text(self.path / "done" / f"{name}.json", json.dumps(result, sort_keys=True) + "\n")

    def result(self, name: str) -> dict[str, Any]:
        """What a finished task left.

        Raises:
            DataError: it is not finished, or the marker is damaged.
        """
        data = read_json(self.path / "done" / f"{name}.json")
        if not isinstance(data, dict):
            raise DataError(f"{self.path / 'done' / name}.json: not a task marker; delete the file and build again")
        return data

    def new_data(self, name: str) -> Path:
        """A path for a task's data that nobody else writes."""
        return self.path / "data" / f"{name}-{uuid.uuid4().hex[:12]}"

    def data(self, file_name: str) -> Path:
        """Where data that a marker names lies."""
        return self.path / "data" / Path(file_name).name

    def sweep(self, keep: Iterable[str], *, older_than_s: float = 3600.0) -> None:
        """Delete data that killed tasks left: what no marker names and nobody has written to for a while.

        Args:
            keep: names of data that markers name.
            older_than_s: least age in seconds; a task of another job may be writing what is younger.
        """
        kept, now = set(keep), time.time()
        folder = self.path / "data"
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in kept and now - _last_write(path) > older_than_s:
                remove_quietly(path)

    def claim(self, name: str) -> RunLease:
        """The right to run a task that other jobs may want to run too; a dead owner's right ends."""
        return RunLease(self.path / "claims" / name)

    def remove(self) -> None:
        """Delete everything, gone at once for others; the output is published."""
        remove_directory(self.path)


def remove_quietly(path: Path) -> None:
    """Delete a file or a tree; what is gone already is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _last_write(path: Path) -> float:
    times = [0.0]
    for place in (path, *path.rglob("*")):
        try:
            times.append(place.stat().st_mtime)
        except OSError:  # deleted meanwhile by the one that wrote it
            continue
    return max(times)
