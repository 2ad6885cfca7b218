"""One save behind the training: a thread per rank that writes its file, and on rank 0 waits for the others and publishes.

Never a collective and never a GPU: ranks meet through `reports`. A thread ends with an outcome or, if it is cancelled, with a
failure; a thread that the disk holds for ever is told by `late`, left behind, and never joined.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dstrain.base.errors import DstrainError, ExitCode, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import remove_directory
from dstrain.checkpoint.layout import fragment_file, reports_folder, step_folder
from dstrain.checkpoint.outcome import Published, SaveOutcome
from dstrain.checkpoint.publish import Contents, publish
from dstrain.checkpoint.rank_file import Part, SaveCancelledError, is_full, write_part
from dstrain.checkpoint.reports import Collector, asked_again, write_report
from dstrain.checkpoint.retention import Retention
from dstrain.checkpoint.snapshot import Snapshot

ResultT = TypeVar("ResultT")

_LOG = get_logger(__name__)
_LOOK_S = 0.02
_LOOK_MOST_S = 0.5


@dataclass(frozen=True)
class SavePlan:
    """What is to be done, the same on every rank but for `contents`."""

    step: int
    nonce: str
    staging: Path
    folder: Path
    """`checkpoints/` of the run."""
    rank: int
    world_size: int
    verify: bool
    timeout_s: float
    """For every rank's file, from `started`."""
    contents: Contents
    """Used by rank 0."""
    protect: frozenset[int]
    started: float = field(default_factory=time.monotonic)
    copy_s: float = 0.0


class SaveThread:
    """A save in flight on this rank."""

    grace_s = 30.0
    """How long after its deadline, or after it was cancelled, a thread may take before it counts as hung."""

    def __init__(self, plan: SavePlan, snapshot: Snapshot, *, fault: str = "") -> None:
        """Prepare; `start` begins.

        Args:
            plan: the save.
            snapshot: what this rank writes; must not change before the thread has ended.
            fault: why this rank cannot take part; then the thread only tells the others.
        """
        self.plan = plan
        self.outcome: SaveOutcome | None = None
        self._snapshot, self._fault = snapshot, fault
        self._ended, self._cancelled = threading.Event(), threading.Event()
        self._reason = ""
        self._give_up_at = plan.started + plan.timeout_s + self.grace_s
        self._thread = threading.Thread(target=self._guarded, name=f"dstrain-save-{plan.step}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def fail(self, error: str) -> None:
        """End at once, with an error, a save that was never begun."""
        self._finish(SaveOutcome(self.plan.step, error=error, exit_code=int(ExitCode.RETRY_HERE)))

    def wait(self, seconds: float) -> bool:
        """Wait for the thread to end; whether it has."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return self.ended

    def cancel(self, reason: str) -> None:
        """Ask the thread to give up; the first reason counts."""
        if not self._cancelled.is_set():
            self._reason = reason
            self._give_up_at = min(self._give_up_at, time.monotonic() + self.grace_s)
            self._cancelled.set()

    @property
    def ended(self) -> bool:
        """Whether the thread has ended with an outcome, or died without one."""
        if not self._ended.is_set() and self._thread.ident is not None and not self._thread.is_alive():
            self._finish(self._failure(f"rank {self.plan.rank}: the writing thread died"))
        return self._ended.is_set()

    @property
    def late(self) -> bool:
        """Whether it counts as hung."""
        return not self.ended and time.monotonic() > self._give_up_at

    @property
    def holds_the_buffer(self) -> bool:
        """Whether the thread may still read the snapshot."""
        return self._thread.is_alive()

    def _guarded(self) -> None:
        try:
            self._finish(self._run())
        except SaveCancelledError:
            self._finish(self._failure(self._reason))
        except DstrainError as error:
            self._finish(self._failure(self._own(str(error)), int(error.exit_code)))
        except Exception as error:  # noqa: BLE001  (a defect here must end the save, not the training)
            _LOG.exception("unexpected error while saving")
            self._finish(self._failure(f"rank {self.plan.rank}: unexpected {type(error).__name__}: {error}"))

    def _run(self) -> SaveOutcome:
        """Write this rank's file and report it; rank 0 does more."""
        plan, attempt = self.plan, 1
        while True:
            try:
                part = self._write()
            except (DstrainError, OSError) as error:
                full = is_full(error) and attempt == 1
                write_report(plan.staging, plan.nonce, plan.rank, attempt, None, error=str(error), full=full)
                if not full or not self._wait_for_room():
                    raise
                attempt = 2
                continue
            write_report(plan.staging, plan.nonce, plan.rank, attempt, part)
            return SaveOutcome(plan.step, own_part=True)

    def _write(self) -> Part:
        if self._fault:
            raise StorageError(self._fault)
        path = self.plan.staging / fragment_file(self.plan.rank, self.plan.world_size)
        return write_part(path, self._snapshot, verify=self.plan.verify, cancelled=self._cancelled.is_set)

    def _wait_for_room(self) -> bool:
        """Until rank 0 has made some; False when it does not, which it shows by ending the save."""
        pause = _LOOK_S
        while reports_folder(self.plan.staging).exists() and not self._out_of_time():
            if asked_again(self.plan.staging, self.plan.nonce):
                return True
            self._pause(pause)
            pause = min(2 * pause, _LOOK_MOST_S)
        return False

    def _pause(self, seconds: float) -> None:
        if self._cancelled.wait(seconds):
            raise SaveCancelledError

    def _out_of_time(self) -> bool:
        return time.monotonic() > self.plan.started + self.plan.timeout_s

    def _own(self, error: str) -> str:
        return f"rank {self.plan.rank}: {error}"

    def _failure(self, problem: str, exit_code: int = int(ExitCode.RETRY_HERE)) -> SaveOutcome:
        return SaveOutcome(
            self.plan.step, error=f"checkpoint of step {self.plan.step} was not saved: {problem}", exit_code=exit_code
        )

    def _finish(self, outcome: SaveOutcome) -> None:
        if not self._ended.is_set():
            self.outcome = outcome
            self._ended.set()


class PublishingThread(SaveThread):
    """Rank 0's part: its own file like any other, then everybody's reports, the manifest, the rename, retention."""

    def __init__(
        self, plan: SavePlan, snapshot: Snapshot, *, retention: Retention, check_owner: Callable[[], None],
        on_published: Callable[[Published], None], on_removed: Callable[[list[int]], None] = lambda _: None,
        also_protect: Callable[[], frozenset[int]] = frozenset, fault: str = "",
    ) -> None:  # fmt: skip
        """Prepare; `start` begins.

        Args:
            plan: the save.
            snapshot: what this rank writes.
            retention: what stays.
            check_owner: raises when the run belongs to another job; asked immediately before the rename.
            on_published: told of the checkpoint in place.
            on_removed: told of the steps that retention deleted.
            also_protect: steps that must stay for the moment (being copied elsewhere).
            fault: why this rank cannot take part.
        """
        super().__init__(plan, snapshot, fault=fault)
        self._on_removed, self._also_protect = on_removed, also_protect
        self._retention, self._check_owner, self._on_published = retention, check_owner, on_published

    def _guarded(self) -> None:
        super()._guarded()
        if self.outcome is not None and self.outcome.published is None:
            remove_staging(self.plan.staging)

    def _run(self) -> SaveOutcome:
        plan = self.plan
        begun = time.monotonic()
        collector = Collector(plan.staging, plan.nonce, plan.world_size)
        own = self._with_room(self._write)
        written = time.monotonic()
        self._collect(collector)
        parts = [own, *(collector.parts[rank] for rank in sorted(collector.parts))]
        size = self._with_room(lambda: publish(
            plan.staging, plan.folder, plan.contents, parts, verify=plan.verify, check_owner=self._check_owner,
        ))  # fmt: skip
        ended = time.monotonic()
        seconds = {
            "copy": plan.copy_s, "write": written - begun, "publish": ended - written, "total": ended - plan.started,
        }  # fmt: skip
        published = Published(plan.step, step_folder(plan.folder, plan.step), size, plan.verify, seconds)
        self._after(published)
        return SaveOutcome(plan.step, published)

    def _after(self, published: Published) -> None:
        """What may fail without unmaking the checkpoint."""
        remove_staging(self.plan.staging)  # the reports; the folder itself has its name
        try:
            self._told_removed(self._retention.apply(protect=self._protected()))
            self._on_published(published)
        except Exception:  # noqa: BLE001  (the checkpoint is there, whatever a callback or a listing thinks)
            _LOG.exception("step %d is saved, but what follows a save failed", self.plan.step)

    def _collect(self, collector: Collector) -> None:
        pause = _LOOK_S
        while True:
            collector.look(self._make_room)
            if not collector.missing:
                return
            if self._out_of_time():
                raise StorageError(
                    f"{_ranks(collector.missing)} did not report within {self.plan.timeout_s:.0f} s: look at their hosts' "
                    "disks, or raise checkpoint.timeout_s"
                )
            self._pause(pause)
            pause = min(1.5 * pause, _LOOK_MOST_S)

    def _own(self, error: str) -> str:
        return error if error.startswith("rank") else f"rank 0: {error}"

    def _make_room(self) -> bool:
        return self._told_removed(self._retention.make_room(self.plan.step, protect=self._protected()))

    def _protected(self) -> frozenset[int]:
        return self.plan.protect | self._also_protect()

    def _told_removed(self, steps: list[int]) -> bool:
        if steps:
            self._on_removed(steps)
        return bool(steps)

    def _with_room(self, action: Callable[[], ResultT]) -> ResultT:
        """Once more where the disk was full and retention had something to delete."""
        try:
            return action()
        except (DstrainError, OSError) as error:
            if not is_full(error) or not self._make_room():
                raise
        return action()


def remove_staging(staging: Path) -> None:
    """Remove what is left of a save, published or not; what cannot be removed now goes at the next start."""
    for path in (staging, reports_folder(staging)):
        try:
            remove_directory(path)
        except StorageError as error:
            _LOG.warning("%s", error)


def _ranks(ranks: dict[int, int]) -> str:
    names = ", ".join(str(rank) for rank in sorted(ranks)[:16])
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"
