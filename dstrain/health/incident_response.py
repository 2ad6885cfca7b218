"""What follows when a watched rank leaves, dies or hangs: the others are told, stacks collected, the suspect named, the rank ended.

One incident has one alarm and one report, whichever watchdog is first. All files are written by the clerk, with a time limit:
when the storage hangs, the rank is still ended in time. Notices nothing itself: that is `health.sidecar`'s.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dstrain.base.errors import ExitCode
from dstrain.base.world import World
from dstrain.health.clerk import Clerk
from dstrain.health.hang_report import Facts, describe, find_suspect, main_frames
from dstrain.health.heartbeat import Beat, Ended
from dstrain.health.incidents import HealthFolder
from dstrain.health.network_view import REACH_S, NetworkView
from dstrain.health.outcomes import Kind, write_exit
from dstrain.health.rank_view import RankView
from dstrain.health.sidecar_settings import STACKS_SIGNAL, SidecarSettings
from dstrain.health.traces import last_crash, oom_kills, tail
from dstrain.health.watched_process import end

_STACKS_S = 0.2
"""Between two looks at the stacks; a dump that has not grown meanwhile is complete."""
_ENDED = {Ended.CLEANLY: "cleanly", Ended.BY_A_FAULT: "fault", Ended.BY_A_LOST_PEER: "peer lost"}


class IncidentResponse:
    """Of one rank's sidecar."""

    def __init__(self, settings: SidecarSettings, view: RankView, folder: HealthFolder, clerk: Clerk) -> None:
        """Note what the rank and the kernel have said before."""
        self._settings, self._view, self._folder, self._clerk = settings, view, folder, clerk
        self._exit_file = Path(settings.run_folder) / "exit" / f"rank-{settings.rank:05d}.json"
        self._exit_before = self._exit_mark()
        self._network = NetworkView(settings.meeting_point)
        self._oom_kills = oom_kills()

    def left(self, beat: Beat) -> None:
        """The rank has closed its heartbeat; after a fault, see to it that its peers do not wait for ever."""
        facts = {**self._view.facts(beat), "ended": _ENDED[beat.ended]}
        self._do(lambda: self._folder.publish(self._settings.rank, facts))
        if beat.ended is Ended.CLEANLY:
            return
        self._view.count_children_again()
        deadline = time.monotonic() + self._settings.peer_grace_s
        gone = noticed = False
        while not (gone and noticed) and time.monotonic() < deadline:
            gone = self._view.process.wait(self._settings.poll_s)
            noticed = bool(self._do(self._all_ended))
        if gone:
            end(self._view.children)
        if not noticed:
            lost = beat.ended is Ended.BY_A_LOST_PEER
            why = "because another rank was gone" if lost else "with a fault"
            detail = f"left {why} in phase {facts['phase']} of step {facts['step']} (see its exit file)"
            self._announce(alarm_of("lost" if lost else "left", facts, detail))

    def _all_ended(self) -> bool:
        others = (self._folder.facts(r) for r in range(self._settings.world_size))
        return all(f is None or f.get("ended") for f in others)

    def died(self, beat: Beat, facts: dict[str, Any]) -> None:
        """The rank has gone without closing its heartbeat: tell the others, leave its exit file, end its children."""
        end(self._view.children)
        crash = self._do(lambda: last_crash(self._folder.stacks_path(self._settings.rank)))
        cause = crash or "killed, or ended without a word"
        if not crash and oom_kills() > self._oom_kills:
            cause = "probably killed by the kernel for lack of memory, as some process of this host was"
        detail = f"process {self._settings.pid} died in phase {beat.phase.value} of step {beat.step}: {cause}"
        left = self._do(self._first_that_left)
        facts = {**facts, "ended": "died"}
        self._do(lambda: self._folder.publish(self._settings.rank, facts))
        self._announce(alarm_of("left" if left else "died", left or facts, left["detail"] if left else detail))
        self._leave_exit_file(ExitCode.RETRY_HERE, detail, beat.step, kind="peer" if left else "fault")

    def _first_that_left(self) -> dict[str, Any] | None:
        """A peer that left with a fault before: then a launcher has ended this rank, and that peer is the cause."""
        for rank in range(self._settings.world_size):
            facts = self._folder.facts(rank)
            if facts is not None and facts.get("ended") == "fault":
                return {**facts, "detail": f"left with a fault in phase {facts['phase']} of step {facts['step']}"}
        return None

    def _announce(self, alarm: dict[str, Any]) -> None:
        """Raise an alarm whose cause is known and report it at once."""

        def announce() -> None:
            known = self._folder.raise_alarm(alarm)
            if known.get("time") == alarm["time"] and known.get("rank") == alarm["rank"]:
                self._report(known, [self._folder.facts(r) for r in range(self._settings.world_size)])

        self._do(announce)

    def respond(self, alarm: Facts) -> bool:
        """Answer an alarm: stacks, report, exit file, the rank's end. False when the rank leaves by itself after all."""
        settings = self._settings
        if alarm["kind"] != "hung" and self._leaves_by_itself():
            return False
        deadline = time.monotonic() + settings.report_s
        state = self._view.process.state
        if state not in ("T", "t"):
            self._view.process.signal(STACKS_SIGNAL)
            if self._view.process.wait(_STACKS_S):
                return False
        beat = self._view.beat()
        if beat.ended is not Ended.RUNNING:
            return False
        facts = {**self._view.facts(beat), "acknowledged": alarm["number"], "kernel": self._view.process.details()}
        children = self._view.process.descendants(but_not=os.getpid())
        report = self._do(lambda: self._collect(alarm, facts, deadline), seconds=settings.report_s + _STACKS_S)
        finding = (report or {}).get("finding") or {"cause": "storage", "rank": None, "is_the_nodes": False}
        line = (report or {}).get("line") or f"rank {settings.rank} hangs, and so does the run folder: no report"
        if report is None:
            say(line)
        self._view.process.signal(signal.SIGKILL)
        end(children)
        theirs = finding["rank"] not in (None, settings.rank)
        own_node = finding["is_the_nodes"] and not theirs
        code = ExitCode.UNHEALTHY_NODE if own_node else ExitCode.RETRY_HERE
        self._leave_exit_file(code, line, beat.step, kind="peer" if theirs else "fault")
        ended = "killed" if self._view.process.wait(settings.kill_s) else "cannot be killed: it is in a device wait"
        self._do(lambda: self._folder.publish(settings.rank, {**facts, "ended": ended}))
        return True

    def _leaves_by_itself(self) -> bool:
        deadline = time.monotonic() + self._settings.peer_grace_s
        while time.monotonic() < deadline:
            if self._view.process.wait(self._settings.poll_s) or self._view.beat().ended is not Ended.RUNNING:
                return True
        return False

    def _collect(self, alarm: Facts, facts: dict[str, Any], deadline: float) -> dict[str, Any]:
        """On the clerk's thread: wait for every rank's facts, then find the suspect; the first report is everybody's."""
        ranks = range(self._settings.world_size)
        facts["frames"] = self._frames(deadline - 1.5) if facts["state"] not in ("T", "t") else []
        facts |= self._network.facts(timeout_s=min(REACH_S, self._settings.report_s / 4))
        self._folder.publish(self._settings.rank, facts)
        number = int(alarm["number"])
        while True:
            report = self._folder.report(number)
            if report is not None:
                return report
            known = [self._folder.facts(r) for r in ranks]
            if all(f and (f.get("ended") or f.get("acknowledged") == number) for f in known):
                break
            if time.monotonic() > deadline - 1.0:
                break
            time.sleep(0.1)
        return self._report(alarm, known)

    def _frames(self, deadline: float) -> list[str]:
        """The main thread's innermost frames, once the dump that was asked for has come to its end."""
        path = self._folder.stacks_path(self._settings.rank)
        before, now = "", tail(path)
        while (not now or now != before) and time.monotonic() < deadline:
            time.sleep(_STACKS_S)
            before, now = now, tail(path)
        return main_frames(now)[:12]

    def _report(self, alarm: Facts, known: list[dict[str, Any] | None]) -> dict[str, Any]:
        finding = find_suspect(alarm, known)
        line = describe(alarm, finding)
        plain = {**dataclasses.asdict(finding), "is_the_nodes": finding.is_the_nodes}
        content = {"alarm": dict(alarm), "finding": plain, "line": line, "ranks": known}
        report, mine = self._folder.publish_report(int(alarm["number"]), content)
        if mine:
            say(line)
        return report

    def _leave_exit_file(self, code: ExitCode, cause: str, step: int, *, kind: Kind) -> None:
        """Say how the rank ended, unless it has said so itself."""
        world = World(rank=self._settings.rank, size=self._settings.world_size)
        folder = Path(self._settings.run_folder)

        def leave() -> None:
            if self._exit_mark() == self._exit_before:
                write_exit(folder, world, code=code, cause=cause, step=step, kind=kind)

        self._do(leave)

    def _exit_mark(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._exit_file)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _do(self, action: Any, *, seconds: float | None = None) -> Any:
        return self._clerk.do(action, seconds=self._settings.report_s if seconds is None else seconds)


def alarm_of(kind: str, facts: Facts, detail: str) -> dict[str, Any]:
    """The content of an alarm about a rank.

    Args:
        kind: hung, died, left, or lost.
        facts: the rank's.
        detail: for people.
    """
    names = ("rank", "host", "pid", "phase", "step", "time_in_phase_s", "state", "time")
    return {"kind": kind, "detail": detail, "number": 0, **{name: facts[name] for name in names}}


def say(line: str) -> None:
    """One line for people, where the rank's own errors go."""
    try:
        sys.stderr.write(f"dstrain watchdog: {line}\n")
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        pass
