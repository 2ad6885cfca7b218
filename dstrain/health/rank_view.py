"""One rank as the process beside it sees it: alive or not, where it is, for how long, and which children it has.

Looks and counts; judges nothing and writes nothing. Standard library only.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from dstrain.health.heartbeat import Beat, HeartbeatReader
from dstrain.health.phase_budgets import ObservedTime
from dstrain.health.sidecar_settings import SidecarSettings
from dstrain.health.watched_process import ProcessId, WatchedProcess

_COUNT_CHILDREN_S = 1.0


class RankView:
    """A rank under watch.

    Attributes:
        process: the rank's.
        children: of the rank as last seen; when it has died, nobody knows any more whose they were.
    """

    def __init__(self, settings: SidecarSettings) -> None:
        """Take hold of the rank.

        Raises:
            ProcessLookupError: it has gone already.
        """
        self._settings = settings
        self.process = WatchedProcess(ProcessId(settings.pid, settings.started))
        self.children: list[ProcessId] = []
        self._heartbeat = HeartbeatReader(settings.descriptor)
        self._time = ObservedTime(longest_look_s=max(1.0, 2 * settings.poll_s))
        self._stopped = ObservedTime(longest_look_s=max(1.0, 2 * settings.poll_s))
        self._looks_awake = 0
        self._host = socket.gethostname()
        self._sequence = 0
        self._counted_at = 0.0

    def beat(self) -> Beat:
        """What the rank wrote last."""
        return self._heartbeat.read()

    def count_children(self) -> None:
        """Look for the rank's children, at most once a second."""
        now = time.monotonic()
        if now - self._counted_at >= _COUNT_CHILDREN_S:
            self._counted_at = now
            self.children = self.process.descendants(but_not=os.getpid())

    def count_children_again(self) -> None:
        """Look at once; what was seen before stays when the rank shows none any more."""
        self.children = self.process.descendants(but_not=os.getpid()) or self.children

    def facts(self, beat: Beat) -> dict[str, Any]:
        """Where the rank is, for its file; takes in one reading of the heartbeat."""
        state = self.process.state
        stopped, now = state in ("T", "t"), time.monotonic()
        # A world of one that is stopped holds nobody up: a person has pressed Ctrl-Z.
        forgive = self._settings.world_size == 1 and stopped
        waited = self._time.look(counter=beat.counter, stamp_s=beat.stamp_ns / 1e9, now_s=now, forgive=forgive)
        self._looks_awake += not stopped
        stopped_s = self._stopped.look(counter=self._looks_awake, stamp_s=now, now_s=now, forgive=forgive)
        self._sequence += 1
        return {
            "rank": self._settings.rank,
            "world_size": self._settings.world_size,
            "host": self._host,
            "pid": self._settings.pid,
            "phase": beat.phase.value,
            "step": beat.step,
            "time_in_phase_s": round(waited, 3),
            "allowance_s": round(self._settings.budgets.allowance_s(beat), 3),
            "state": state,
            "stopped_s": round(stopped_s, 3),
            "ended": "",
            "sequence": self._sequence,
            "time": time.time(),
        }
