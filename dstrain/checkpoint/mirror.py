"""The second tier: each published checkpoint is copied to another place behind everything else, and comes back when it is needed.

One thread of rank 0 copies the newest checkpoint offered; those that became old while it was busy are passed over. Its failures are
events and never touch the run. What is kept there has its own number.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dstrain.base.errors import CheckpointError, DstrainError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import make_directory, publish_directory, remove_directory
from dstrain.checkpoint.layout import staging_folder, step_folder
from dstrain.checkpoint.manifest import read_manifest
from dstrain.checkpoint.mirror_places import MirrorPlace
from dstrain.checkpoint.publish import move_aside
from dstrain.checkpoint.reader import Checkpoint
from dstrain.checkpoint.retention import Kept, steps_to_delete

_LOG = get_logger(__name__)

Event = dict[str, Any]


class Mirror:
    """Copies of a run's checkpoints in a second place."""

    def __init__(self, place: MirrorPlace, *, kept: Kept, on_event: Callable[[Event], None] = lambda _: None) -> None:
        """Prepare; the thread starts with the first offer.

        Args:
            place: where copies go.
            kept: how many stay there.
            on_event: told, by the thread, of every copy and every failure: {"event": "mirrored" or "mirror_failed", "step", ...}.
        """
        self._place, self._kept, self._on_event = place, kept, on_event
        self._changed = threading.Condition()
        self._waiting: tuple[int, Path, frozenset[int]] | None = None
        self._copying: int | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def offer(self, step: int, folder: Path, *, protect: Collection[int] = ()) -> None:
        """Copy this checkpoint as soon as possible, in place of any other that still waits.

        Args:
            step: of the checkpoint.
            folder: where it is.
            protect: steps that must stay in the mirror (the best).
        """
        with self._changed:
            if self._closed:
                return
            self._waiting = step, folder, frozenset(protect)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="dstrain-mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def needed(self) -> frozenset[int]:
        """Steps whose checkpoints must stay for now because they are being copied, or are next."""
        with self._changed:
            waiting = () if self._waiting is None else (self._waiting[0],)
            copying = () if self._copying is None else (self._copying,)
            return frozenset((*waiting, *copying))

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to copy; whether that came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._copying is None, seconds)

    def close(self, *, wait_s: float) -> bool:
        """Let the thread finish what it has, for a while, then leave it behind; whether it finished."""
        finished = self.wait(wait_s)
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()
        return finished

    def steps(self) -> list[int]:
        """Steps that seem to be there, newest first; none, with a warning, when the place cannot be asked."""
        try:
            return self._place.steps()
        except DstrainError as error:
            _LOG.warning("the mirror cannot be asked for checkpoints, only local ones are seen: %s", error)
            return []

    def fetch(self, step: int, folder: Path) -> Path:
        """Copy one back: staged, hashed, renamed, like a save; what has its name here is moved aside.

        Raises:
            CheckpointError: it is not whole there, or cannot be read.
            StorageError: it cannot be written here.
        """
        staging = staging_folder(folder, step, uuid.uuid4().hex[:12])
        final = step_folder(folder, step)
        try:
            make_directory(staging)
            try:
                self._place.get(step, staging)
            except StorageError as error:
                raise CheckpointError(f"{self._place.shown}: step {step} cannot be copied back: {error}") from None
            checkpoint = Checkpoint(staging, trust_owner=True)
            if checkpoint.manifest.step != step:
                raise CheckpointError(f"{self._place.shown}: step {step} holds step {checkpoint.manifest.step}")
            checkpoint.verify()
            if final.exists():
                move_aside(final)
            publish_directory(staging, final)
        finally:
            remove_directory(staging)
        _LOG.info("step %d was copied back from %s", step, self._place.shown)
        return final

    def forget_newer(self, step: int) -> list[int]:
        """After a rollback: delete every copy of a newer step.

        Raises:
            StorageError: one cannot be deleted.
        """
        with self._changed:
            if self._waiting is not None and self._waiting[0] > step:
                self._waiting = None
            self._changed.wait_for(lambda: self._copying is None or self._copying <= step, 60.0)
        newer = [found for found in self._place.steps() if found > step]
        for found in newer:
            self._place.remove(found)
        return newer

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                if self._waiting is None:
                    return
                (step, folder, protect), self._waiting = self._waiting, None
                self._copying = step
            try:
                self._copy(step, folder, protect)
            finally:
                with self._changed:
                    self._copying = None
                    self._changed.notify_all()

    def _copy(self, step: int, folder: Path, protect: frozenset[int]) -> None:
        started = time.monotonic()
        try:
            manifest = read_manifest(folder)
            self._place.put(folder, manifest)
            size = sum(entry.size_bytes for entry in manifest.files.values())
            self._tell("mirrored", step, seconds=time.monotonic() - started, size_bytes=size)
            self._thin_out(step, protect)
        except (DstrainError, OSError) as error:
            self._tell("mirror_failed", step, error=str(error))
        except Exception as error:  # noqa: BLE001  (a defect here must not end the run)
            _LOG.exception("unexpected error in the mirror")
            self._tell("mirror_failed", step, error=f"unexpected {type(error).__name__}")

    def _thin_out(self, newest: int, protect: frozenset[int]) -> None:
        """Delete what the rule does not keep, and what uploads that never ended have left behind."""
        found = self._place.steps()
        whole = [step for step in found if step == newest or self._place.complete(step)]
        doomed = steps_to_delete(whole, kept=self._kept, protect=protect, verified=[newest])
        for step in [*doomed, *(step for step in found if step < newest and step not in whole)]:
            self._place.remove(step)

    def _tell(self, event: str, step: int, **more: Any) -> None:
        if event == "mirror_failed":
            _LOG.warning(
                "the copy of step %d to %s failed, the next one will try again: %s",
                step,
                self._place.shown,
                more["error"],
            )
        self._on_event({"event": event, "step": step, "place": self._place.shown, **more})
