"""The process beside each rank that watches it: `python -m dstrain.health.sidecar SETTINGS`, started by `health.watchdog`.

Notices, within its phase's allowance, that the rank makes no progress, and at once that it is gone; what follows then
is `health.incident_response`'s: in the end it kills its own rank and that one's children, because a rank in a hung
collective hears nothing else. It ends within a second of its rank (a moment later when the rank left with a fault: see
`peer_grace_s`).

All files are written by a second thread: when the storage hangs, the main thread still ends the rank in time. Imports
neither torch nor pydantic.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dstrain.base.errors import StorageError
from dstrain.health.clerk import Clerk
from dstrain.health.hang_report import Facts, is_alibi
from dstrain.health.heartbeat import Ended
from dstrain.health.incident_response import IncidentResponse, alarm_of, say
from dstrain.health.incidents import HealthFolder
from dstrain.health.rank_view import RankView
from dstrain.health.sidecar_settings import SidecarSettings

SILENT_AFTER = 3
"""A peer's file that is not renewed for so many intervals says nothing any more."""


class Sidecar:
    """Watches one rank until it ends."""

    def __init__(self, settings: SidecarSettings) -> None:
        """Take hold of the rank.

        Raises:
            ProcessLookupError: it has gone already.
            StorageError: the run folder cannot be written.
        """
        self._settings = settings
        self._view = RankView(settings)
        self._folder = HealthFolder(Path(settings.run_folder), job=settings.job, first=settings.first)
        self._clerk = Clerk()
        self._response = IncidentResponse(settings, self._view, self._folder, self._clerk)
        self._published_at = 0.0
        self._peers: dict[int, tuple[int, float]] = {}

    def run(self) -> None:
        """Watch until the rank has ended, by itself or by this."""
        while True:
            gone = self._view.process.wait(self._settings.poll_s)
            beat = self._view.beat()
            if beat.ended is not Ended.RUNNING:
                return self._response.left(beat)
            facts = self._view.facts(beat)
            if gone:
                return self._response.died(beat, facts)
            alarm = self._round(facts)
            if alarm is not None and self._response.respond(alarm):
                return None

    def _round(self, facts: dict[str, Any]) -> Facts | None:
        """One look around, unless the clerk is still busy with the last one; the alarm to respond to, or None."""
        # No phase is a reason to be stopped, so a stopped process has the allowance of a short step in all of them.
        stopped_too_long = facts["stopped_s"] > self._settings.budgets.min_step_budget_s
        overdue = max(facts["time_in_phase_s"] - facts["allowance_s"], 0.001 if stopped_too_long else -math.inf)
        if self._clerk.is_busy:
            if overdue > self._settings.report_s:
                return alarm_of("hung", facts, "the run folder does not answer")
            return None
        alarm: Facts | None = self._clerk.take()
        if alarm is not None:
            return alarm
        self._view.count_children()
        now = time.monotonic()
        publish = now - self._published_at >= self._settings.publish_s
        if publish:
            self._published_at = now
        self._clerk.start(lambda: self._look_around(facts, overdue=overdue, publish=publish))
        return None

    def _look_around(self, facts: dict[str, Any], *, overdue: float, publish: bool) -> Facts | None:
        """On the clerk's thread: publish, read alarms, and raise one when nobody explains the wait."""
        if publish:
            self._folder.publish(self._settings.rank, facts)
        alarm = self._folder.alarm()
        if alarm is None and overdue > -SILENT_AFTER * self._settings.publish_s:
            excused = self._has_alibi(facts) and not facts["stopped_s"]
            if overdue > 0 and not excused:
                detail = f"no progress for {facts['time_in_phase_s']:.1f} s, {facts['allowance_s']:.1f} s are allowed"
                detail += f", stopped for {facts['stopped_s']:.1f} s" if facts["stopped_s"] else ""
                alarm = self._folder.raise_alarm(alarm_of("hung", facts, detail))
        return alarm

    def _has_alibi(self, facts: Facts) -> bool:
        """Whether a peer that is behind explains the wait; looked at for a while before it matters, to know who is silent."""
        excused = False
        for rank in range(self._settings.world_size):
            other = self._folder.facts(rank) if rank != self._settings.rank else None
            if other is None:
                continue
            known, since = self._peers.get(rank, (-1, 0.0))
            if known != other.get("sequence"):
                since = time.monotonic()
                self._peers[rank] = (int(other.get("sequence", -1)), since)
            fresh = time.monotonic() - since < SILENT_AFTER * self._settings.publish_s
            excused = excused or (fresh and is_alibi(facts, other))
        return excused


def main(arguments: list[str]) -> int:
    """Watch the rank named in the settings until it ends."""
    # What asks the job to stop is for the rank; this process ends with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        Sidecar(SidecarSettings.from_plain(json.loads(arguments[0]))).run()
    except ProcessLookupError:
        pass
    except StorageError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    # Not sys.exit: a clerk that is stuck in a dead file system must not keep this process.
    os._exit(main(sys.argv[1:]))
