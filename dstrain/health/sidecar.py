"""The process beside each rank that watches it: `python -m dstrain.health.sidecar SETTINGS`, started by `health.watchdog`.

Notices, within its phase's allowance, that the rank makes no progress, and at once that it is gone; tells the other
sidecars through the run folder, collects stacks, names the suspect, leaves `exit/rank-K.json` and ends its own rank and that
one's children with SIGKILL, because a rank in a hung collective hears nothing else. It ends within a second of its rank (a
moment later when the rank left with a fault: see `peer_grace_s`).

All files are written by a second thread: when the storage hangs, the main thread still ends the rank in time. Imports
neither torch nor pydantic.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dstrain.base.errors import ExitCode, StorageError
from dstrain.base.world import World
from dstrain.health.clerk import Clerk
from dstrain.health.hang_report import Facts, describe, find_suspect, is_alibi, main_frames
from dstrain.health.heartbeat import Beat, Ended, HeartbeatReader
from dstrain.health.incidents import HealthFolder
from dstrain.health.outcomes import write_exit
from dstrain.health.phase_budgets import ObservedTime, PhaseBudgets
from dstrain.health.watched_process import ProcessId, WatchedProcess, end

STACKS_SIGNAL = signal.SIGRTMIN + 5
"""Makes a rank write its stacks; no launcher and no library uses it."""
SILENT_AFTER = 3
"""A peer's file that is not renewed for so many intervals says nothing any more."""
_STACKS_S = 0.2
"""Between two looks at the stacks; a dump that has not grown meanwhile is complete."""
_COUNT_CHILDREN_S = 1.0


@dataclasses.dataclass(frozen=True)
class SidecarSettings:
    """What a sidecar is told by its rank; the timings are those of `WatchdogConfig`."""

    TIMING: ClassVar[tuple[str, ...]] = ("poll_s", "publish_s", "report_s", "kill_s", "peer_grace_s")

    run_folder: str
    rank: int
    world_size: int
    pid: int
    started: int
    descriptor: int
    job: str
    first: int
    budgets: PhaseBudgets
    poll_s: float
    publish_s: float
    report_s: float
    kill_s: float
    peer_grace_s: float

    def to_plain(self) -> dict[str, Any]:
        """As JSON-able data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> SidecarSettings:
        """Back from `to_plain`."""
        return cls(**{**data, "budgets": PhaseBudgets(**data["budgets"])})


class Sidecar:
    """Watches one rank until it ends."""

    def __init__(self, settings: SidecarSettings) -> None:
        """Take hold of the rank.

        Raises:
            ProcessLookupError: it has gone already.
            StorageError: the run folder cannot be written.
        """
        self._settings = settings
        self._rank = WatchedProcess(ProcessId(settings.pid, settings.started))
        self._heartbeat = HeartbeatReader(settings.descriptor)
        self._time = ObservedTime(longest_look_s=max(1.0, 2 * settings.poll_s))
        self._stopped = ObservedTime(longest_look_s=max(1.0, 2 * settings.poll_s))
        self._looks_awake = 0
        self._folder = HealthFolder(Path(settings.run_folder), job=settings.job, first=settings.first)
        self._exit_file = Path(settings.run_folder) / "exit" / f"rank-{settings.rank:05d}.json"
        self._exit_before = self._exit_mark()
        self._clerk = Clerk()
        self._host = socket.gethostname()
        self._oom_kills = _oom_kills()
        self._sequence = 0
        self._published_at = self._counted_at = 0.0
        self._children: list[
            ProcessId
        ] = []  # as last seen: when a rank has died, nobody knows any more whose they were
        self._peers: dict[int, tuple[int, float]] = {}

    def run(self) -> None:
        """Watch until the rank has ended, by itself or by this."""
        while True:
            gone = self._rank.wait(self._settings.poll_s)
            beat = self._heartbeat.read()
            if beat.ended is not Ended.RUNNING:
                return self._left(beat)
            facts = self._facts(beat)
            if gone:
                return self._died(beat, facts)
            alarm = self._round(beat, facts)
            if alarm is not None and self._respond(alarm):
                return None

    # What the rank does.

    def _facts(self, beat: Beat) -> dict[str, Any]:
        state = self._rank.state
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

    def _round(self, beat: Beat, facts: dict[str, Any]) -> Facts | None:
        """One look around, unless the clerk is still busy with the last one; the alarm to respond to, or None."""
        # No phase is a reason to be stopped, so a stopped process has the allowance of a short step in all of them.
        stopped_too_long = facts["stopped_s"] > self._settings.budgets.min_step_budget_s
        overdue = max(facts["time_in_phase_s"] - facts["allowance_s"], 0.001 if stopped_too_long else -math.inf)
        if self._clerk.is_busy:
            if overdue > self._settings.report_s:
                return self._alarm("hung", facts, "the run folder does not answer")
            return None
        alarm: Facts | None = self._clerk.take()
        if alarm is not None:
            return alarm
        now = time.monotonic()
        if now - self._counted_at >= _COUNT_CHILDREN_S:
            self._counted_at = now
            self._children = self._rank.descendants(but_not=os.getpid())
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
                alarm = self._folder.raise_alarm(self._alarm("hung", facts, detail))
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

    def _alarm(self, kind: str, facts: Facts, detail: str) -> dict[str, Any]:
        names = ("rank", "host", "pid", "phase", "step", "time_in_phase_s", "state", "time")
        return {"kind": kind, "detail": detail, "number": 0, **{name: facts[name] for name in names}}

    # What follows from it.

    def _left(self, beat: Beat) -> None:
        """The rank has closed its heartbeat; after a fault, see to it that its peers do not wait for ever."""
        facts = {**self._facts(beat), "ended": "cleanly" if beat.ended is Ended.CLEANLY else "fault"}
        self._do(lambda: self._folder.publish(self._settings.rank, facts))
        if beat.ended is Ended.CLEANLY:
            return
        self._children = self._rank.descendants(but_not=os.getpid()) or self._children
        deadline = time.monotonic() + self._settings.peer_grace_s
        gone = noticed = False
        while not (gone and noticed) and time.monotonic() < deadline:
            gone = self._rank.wait(self._settings.poll_s)
            noticed = bool(self._do(self._all_ended))
        if gone:
            end(self._children)
        if not noticed:
            detail = f"left with a fault in phase {facts['phase']} of step {facts['step']} (see its exit file)"
            self._announce(self._alarm("left", facts, detail))

    def _all_ended(self) -> bool:
        others = (self._folder.facts(r) for r in range(self._settings.world_size))
        return all(f is None or f.get("ended") for f in others)

    def _died(self, beat: Beat, facts: dict[str, Any]) -> None:
        """The rank has gone without closing its heartbeat: tell the others, leave its exit file, end its children."""
        end(self._children)
        crash = self._do(lambda: _last_crash(self._folder.stacks_path(self._settings.rank)))
        cause = crash or "killed, or ended without a word"
        if not crash and _oom_kills() > self._oom_kills:
            cause = "probably killed by the kernel for lack of memory, as some process of this host was"
        detail = f"process {self._settings.pid} died in phase {beat.phase.value} of step {beat.step}: {cause}"
        left = self._do(self._first_that_left)
        facts = {**facts, "ended": "died"}
        self._do(lambda: self._folder.publish(self._settings.rank, facts))
        self._announce(self._alarm("left" if left else "died", left or facts, left["detail"] if left else detail))
        self._leave_exit_file(ExitCode.RETRY_HERE, detail, beat.step)

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

    def _respond(self, alarm: Facts) -> bool:
        """Answer an alarm: stacks, report, exit file, the rank's end. False when the rank leaves by itself after all."""
        settings = self._settings
        if alarm["kind"] != "hung" and self._leaves_by_itself():
            return False
        deadline = time.monotonic() + settings.report_s
        state = self._rank.state
        if state not in ("T", "t"):
            self._rank.signal(STACKS_SIGNAL)
            if self._rank.wait(_STACKS_S):
                return False
        beat = self._heartbeat.read()
        if beat.ended is not Ended.RUNNING:
            return False
        facts = {**self._facts(beat), "acknowledged": alarm["number"], "kernel": self._rank.details()}
        children = self._rank.descendants(but_not=os.getpid())
        report = self._do(lambda: self._collect(alarm, facts, deadline), seconds=settings.report_s + _STACKS_S)
        finding = (report or {}).get("finding") or {"cause": "storage", "rank": None, "is_the_nodes": False}
        line = (report or {}).get("line") or f"rank {settings.rank} hangs, and so does the run folder: no report"
        if report is None:
            _say(line)
        self._rank.signal(signal.SIGKILL)
        end(children)
        mine = finding["is_the_nodes"] and finding["rank"] == settings.rank
        self._leave_exit_file(ExitCode.UNHEALTHY_NODE if mine else ExitCode.RETRY_HERE, line, beat.step)
        ended = (
            "killed" if self._rank.wait(settings.kill_s) else "cannot be killed: the kernel holds it in a device wait"
        )
        self._do(lambda: self._folder.publish(settings.rank, {**facts, "ended": ended}))
        return True

    def _leaves_by_itself(self) -> bool:
        deadline = time.monotonic() + self._settings.peer_grace_s
        while time.monotonic() < deadline:
            if self._rank.wait(self._settings.poll_s) or self._heartbeat.read().ended is not Ended.RUNNING:
                return True
        return False

    def _collect(self, alarm: Facts, facts: dict[str, Any], deadline: float) -> dict[str, Any]:
        """On the clerk's thread: wait for every rank's facts, then find the suspect; the first report is everybody's."""
        ranks = range(self._settings.world_size)
        facts["frames"] = self._frames(deadline - 1.5) if facts["state"] not in ("T", "t") else []
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
        before, now = "", _tail(path)
        while (not now or now != before) and time.monotonic() < deadline:
            time.sleep(_STACKS_S)
            before, now = now, _tail(path)
        return main_frames(now)[:12]

    def _report(self, alarm: Facts, known: list[dict[str, Any] | None]) -> dict[str, Any]:
        finding = find_suspect(alarm, known)
        line = describe(alarm, finding)
        plain = {**dataclasses.asdict(finding), "is_the_nodes": finding.is_the_nodes}
        content = {"alarm": dict(alarm), "finding": plain, "line": line, "ranks": known}
        report, mine = self._folder.publish_report(int(alarm["number"]), content)
        if mine:
            _say(line)
        return report

    def _leave_exit_file(self, code: ExitCode, cause: str, step: int) -> None:
        """Say how the rank ended, unless it has said so itself."""
        world = World(rank=self._settings.rank, size=self._settings.world_size)
        folder = Path(self._settings.run_folder)

        def leave() -> None:
            if self._exit_mark() == self._exit_before:
                write_exit(folder, world, code=code, cause=cause, step=step)

        self._do(leave)

    def _exit_mark(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._exit_file)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _do(self, action: Any, *, seconds: float | None = None) -> Any:
        return self._clerk.do(action, seconds=self._settings.report_s if seconds is None else seconds)


def _say(line: str) -> None:
    """One line for people, where the rank's own errors go."""
    try:
        sys.stderr.write(f"dstrain watchdog: {line}\n")
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        pass


def _last_crash(stacks: Path) -> str:
    """The headline that faulthandler leaves when a process crashes, such as "Segmentation fault"."""
    lines = [line for line in _tail(stacks).splitlines() if line.startswith("Fatal Python error: ")]
    return lines[-1].removeprefix("Fatal Python error: ") if lines else ""


def _tail(path: Path, *, limit_bytes: int = 1 << 18) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit_bytes))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _oom_kills() -> int:
    for line in _tail(Path("/proc/vmstat")).splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


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
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    # Not sys.exit: a clerk that is stuck in a dead file system must not keep this process.
    os._exit(main(sys.argv[1:]))
