"""Save a run's state: copy it while training stands still, then write, verify and publish it behind the training.

Every rank copies its fragments into a buffer (`snapshot`); a thread a rank writes them into a staging folder; rank 0's thread publishes
the whole by one rename once every rank's file is durable (`background`). A kill at any instant leaves the checkpoints that were there
untouched and at most a staging folder, which nobody reads. One save is in flight at a time: the next waits for it. A
failed save removes what it wrote and is told on all ranks alike; whether training goes on is the caller's decision.
"""

from __future__ import annotations

import copy
import queue
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dstrain.base.control import ControlPlane
from dstrain.base.errors import CheckpointError, DstrainError, ExitCode, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import ShouldLeave, never
from dstrain.base.storage import discard_directory, make_directory
from dstrain.checkpoint.background import PublishingThread, SavePlan, SaveThread, remove_staging
from dstrain.checkpoint.config import CheckpointConfig as CheckpointConfig
from dstrain.checkpoint.layout import leftovers, reports_folder, staging_folder, step_folder
from dstrain.checkpoint.manifest import Fragment
from dstrain.checkpoint.mirror import Mirror
from dstrain.checkpoint.mirror_places import open_place
from dstrain.checkpoint.outcome import Published, SaveOutcome
from dstrain.checkpoint.publish import Contents
from dstrain.checkpoint.retention import Kept, Retention, set_aside_newer
from dstrain.checkpoint.snapshot import Snapshot

_LOG = get_logger(__name__)
_ROUND_S = 2.0


class CheckpointWriter:
    """Saves checkpoints of one run.

    Attributes:
        folder: `checkpoints/` of the run.
        retention: rank 0's rule of what stays; tell it what a start has verified (`retention.note_verified`).
        mirror: the second tier, or None; for `reader.newest_valid`.
    """

    def __init__(
        self, folder: Path, *, config: CheckpointConfig, control: ControlPlane, check_owner: Callable[[], None] = lambda: None,
        on_published: Callable[[Published], None] | None = None, should_leave: ShouldLeave = never,
    ) -> None:  # fmt: skip
        """Prepare; nothing is written.

        Args:
            folder: `checkpoints/` of the run.
            config: the checkpoint section.
            control: agreements between ranks.
            check_owner: raises RunInUseError when the run belongs to another job by now; rank 0's background thread asks immediately
                before a rename.
            on_published: told of each checkpoint in place, by rank 0's background thread.
            should_leave: whether to raise `Interrupted` rather than wait for a mirror that does not answer.

        Raises:
            ConfigError: the mirror's kind of store cannot be written, or its package is not installed; alike on every rank.
        """
        self.folder, self._config, self._control = folder, config, control
        self._check_owner, self._on_published = check_owner, on_published
        self.retention = Retention(
            folder, kept=Kept(config.keep_last, config.keep_every), trust_owner=config.trust_owner
        )
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.mirror: Mirror | None = None
        if config.mirror is not None:
            kept = Kept(config.mirror_keep_last, config.keep_every)
            self.mirror = Mirror(
                open_place(config.mirror, should_leave=should_leave), kept=kept, on_event=self._events.put
            )
        self._snapshot = Snapshot()
        self._thread: SaveThread | None = None
        self._in_flight = False
        self._shown = False
        self._news: list[SaveOutcome] = []
        self._slowest_s = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a save was started whose end the ranks have not agreed on; the same on every rank."""
        return self._in_flight

    def remove_leftovers(self) -> None:
        """Rank 0 only, and only while it holds the run's lease: delete what killed jobs left in staging.

        A paused former owner that wakes up finds its staging folder gone, so its rename cannot succeed.
        """
        for path in leftovers(self.folder):
            _LOG.info("removing %s, left by an interrupted save", path.name)
            discard_directory(path)

    def start(
        self, fragments: Iterable[Fragment], manifest: Mapping[str, Any], *, config_yaml: str, tokenizer: Path | None,
        protect: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        """Collective. Copy this rank's state and go on; the rest happens behind the training.

        Waits for the save before, if that has not ended; its end, like this one's, is told by `poll` or `settle`. Raises nothing for
        a save that fails.

        Args:
            fragments: this rank's share; may change when this returns.
            manifest: the fields of CheckpointManifest without `files` and `read_back`.
            config_yaml: the resolved configuration, kept beside the tensors.
            tokenizer: folder to copy in, or None.
            protect: steps that retention must not delete (the best).
        """
        if self._in_flight:
            outcome = self.settle()
            if outcome is not None and outcome.first_seen:
                self._news.append(outcome)
        world, step = self._control.world, int(manifest["step"])
        opened = self._control.from_first(self._open_staging(step) if world.is_first else None)
        started = time.monotonic()
        fault = str(opened["error"]) or self._copy(fragments)
        plan = SavePlan(
            step=step, nonce=opened["nonce"], staging=Path(opened["staging"]), folder=self.folder, rank=world.rank,
            world_size=world.size, verify=self._config.verify_after_write, protect=protect, started=started,
            timeout_s=max(self._config.timeout_s, 5 * self._slowest_s), copy_s=time.monotonic() - started,
            contents=Contents(copy.deepcopy(dict(manifest)) if world.is_first else {}, config_yaml, tokenizer),
        )  # fmt: skip
        self._thread = self._thread_of(plan, fault)
        self._in_flight, self._shown = True, False
        if opened["error"]:
            self._thread.fail(opened["error"])
        else:
            self._thread.start()
        if not self._config.asynchronous:
            self._news.append(self._agree(self._thread))

    def poll(self) -> SaveOutcome | None:
        """Local, never waits: an end that this rank has not been shown yet.

        Rank 0 is shown the end of the save; another rank the end of its own part (`own_part`) unless the ranks have agreed since.
        """
        if self._news:
            return self._news.pop(0)
        if self._thread is None or not self._in_flight or self._shown or not self._thread.ended:
            return None
        self._shown = True
        return self._thread.outcome

    def failed(self) -> bool:
        """Local: this rank's part, or on rank 0 the save, has failed or hangs, and the ranks have not agreed on that yet.

        Tell the others at the step's own agreement, and let all call `settle`.
        """
        if self._thread is None or not self._in_flight:
            return False
        outcome = self._thread.outcome if self._thread.ended else None
        return self._thread.late or (outcome is not None and outcome.failed)

    def settle(self) -> SaveOutcome | None:
        """Collective. Wait for the save in flight and agree on its end.

        Returns:
            The same on every rank (except `first_seen`); None when nothing was in flight.
        """
        return self._agree(self._thread) if self._in_flight and self._thread is not None else None

    def save(
        self, fragments: Iterable[Fragment], manifest: Mapping[str, Any], *, config_yaml: str, tokenizer: Path | None,
        protect: frozenset[int] = frozenset(),
    ) -> Path:  # fmt: skip
        """Collective. `start` and `settle`: returns when the checkpoint is in its place.

        Returns:
            The published folder.

        Raises:
            CheckpointError: some rank could not write; the same error on every rank, nothing half-written remains.
            RunInUseError: another job owns the run by now.
        """
        self.start(fragments, manifest, config_yaml=config_yaml, tokenizer=tokenizer, protect=protect)
        outcome = self._news.pop() if not self._in_flight else self.settle()
        if outcome is None or outcome.published is None:
            raise outcome.fault() if outcome is not None else AssertionError("a save has an end")
        return outcome.published.folder

    def take_events(self) -> list[dict[str, Any]]:
        """Local, never waits: what happened behind the training since the last call, besides the ends that `poll` tells.

        Returns:
            JSON-able, each with `event` (mirrored, mirror_failed, checkpoints_removed) and `step`.
        """
        taken = []
        while not self._events.empty():
            taken.append(self._events.get())
        return taken

    def roll_back(self, step: int) -> list[int]:
        """Rank 0, with no save in flight: make sure that no restart goes on from a checkpoint newer than `step`.

        They are renamed and deleted after the next save; copies in the mirror are deleted now.

        Returns:
            The steps concerned.

        Raises:
            CheckpointError: there is no checkpoint of `step` to go on from; nothing is taken away.
            StorageError: one of them cannot be renamed or deleted.
        """
        if not step_folder(self.folder, step).is_dir():
            raise CheckpointError(f"{self.folder}: there is no checkpoint of step {step} to roll back to")
        newer = set(set_aside_newer(self.folder, step))
        if self.mirror is not None:
            newer |= set(self.mirror.forget_newer(step))
        return sorted(newer)

    def wait_for_mirror(self, seconds: float) -> bool:
        """Local. Wait until the second tier has the newest checkpoint, or the time is over; whether nothing is left to copy."""
        return self.mirror is None or self.mirror.wait(seconds)

    def close(self, *, wait_s: float = 5.0) -> None:
        """Local. Give a save in flight, and the mirror, a last while, then give them up; for the way out, orderly or not.

        Args:
            wait_s: how long each may still take to end well.
        """
        self._close_save(wait_s)
        if self.mirror is not None:
            self.mirror.close(wait_s=wait_s)

    def _close_save(self, wait_s: float) -> None:
        thread = self._thread
        if thread is None or not self._in_flight:
            return
        if not thread.wait(wait_s):
            thread.cancel("the run ended first")
            thread.wait(1.0)
        if self._control.world.is_first and (thread.outcome is None or thread.outcome.published is None):
            remove_staging(thread.plan.staging)
        self._in_flight = False

    def _copy(self, fragments: Iterable[Fragment]) -> str:
        """Take the snapshot; returns what went wrong."""
        if self._thread is not None and self._thread.holds_the_buffer:
            return f"the write of step {self._thread.plan.step} still hangs: look at this host's disk"
        try:
            self._snapshot.take(fragments)
        except DstrainError as error:
            return str(error)
        return ""

    def _open_staging(self, step: int) -> dict[str, str]:
        nonce = uuid.uuid4().hex[:12]
        staging = staging_folder(self.folder, step, nonce)
        error = ""
        try:
            make_directory(staging)
            if self._control.world.size > 1:
                make_directory(reports_folder(staging))
        except StorageError as fault:
            _LOG.error("%s", fault)
            remove_staging(staging)
            error = f"{self.folder}: no staging folder could be made for step {step}: {fault}"
        return {"staging": str(staging), "nonce": nonce, "error": error}

    def _thread_of(self, plan: SavePlan, fault: str) -> SaveThread:
        if plan.rank:
            return SaveThread(plan, self._snapshot, fault=fault)
        return PublishingThread(
            plan, self._snapshot, retention=self.retention, check_owner=self._check_owner,
            on_published=lambda published: self._tell_published(published, plan.protect), fault=fault,
            also_protect=lambda: self.mirror.needed() if self.mirror is not None else frozenset(),
            on_removed=lambda steps: self._events.put({"event": "checkpoints_removed", "step": plan.step, "removed": steps}),
        )  # fmt: skip

    def _tell_published(self, published: Published, protect: frozenset[int]) -> None:
        if self.mirror is not None:
            self.mirror.offer(published.step, published.folder, protect=protect)
        if self._on_published is not None:
            self._on_published(published)

    def _agree(self, thread: SaveThread) -> SaveOutcome:
        """Collective. In short rounds, so that no rank waits in an agreement for longer than a round."""
        while True:
            thread.wait(_ROUND_S)
            states = self._control.gather_json(_state(thread))
            problem = next((s["problem"] for s in states if s["problem"]), "")
            if problem:
                thread.cancel(problem)
            if all(s["over"] for s in states):
                break
        outcome = self._outcome(thread.plan.step, states)
        if outcome.failed and self._control.world.is_first:
            remove_staging(thread.plan.staging)
        if outcome.published is not None:
            self._slowest_s = max(self._slowest_s, outcome.published.seconds["total"])
        seen = self._shown and self._control.world.is_first
        self._in_flight = False
        return SaveOutcome(outcome.step, outcome.published, outcome.error, outcome.exit_code, first_seen=not seen)

    def _outcome(self, step: int, states: list[dict[str, Any]]) -> SaveOutcome:
        """What rank 0 says, unless it does not say anything."""
        if states[0]["outcome"] is not None:
            return SaveOutcome.from_plain(states[0]["outcome"])
        error = f"checkpoint of step {step} was not saved: {states[0]['problem']}"
        return SaveOutcome(step, error=error, exit_code=int(ExitCode.RETRY_HERE))


def _state(thread: SaveThread) -> dict[str, Any]:
    """What the others need to know of this rank: whether there is anything to wait for, and what went wrong."""
    plan, late = thread.plan, thread.late
    outcome = thread.outcome if thread.ended else None
    problem = outcome.error if outcome is not None else ""
    if late:
        problem = f"rank {plan.rank}: its write has not ended within {time.monotonic() - plan.started:.0f} s: look at its host's disk"
    return {
        "over": late or outcome is not None,
        "problem": problem.partition(" was not saved: ")[2] or problem,
        "outcome": outcome.to_plain() if outcome is not None and plan.rank == 0 else None,
    }
