"""One process and its children, seen through /proc and a pidfd: is it alive, what is it doing, end it and nobody else.

A process number is used again after its process has gone; here a process is its number and its start time, and a pidfd
where the kernel has them. Ends only the process it was given and that one's descendants. Linux only, standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STATE, _PARENT, _STARTED = 0, 1, 19  # fields of /proc/PID/stat after the command's closing bracket


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: int
    """Clock ticks between the machine's start and the process's."""

    @property
    def is_alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        fields = _stat(self.pid)
        return fields is not None and int(fields[_STARTED]) == self.started and fields[_STATE] not in ("Z", "X")


def identify(pid: int) -> ProcessId | None:
    """The process that has this number now, or None."""
    fields = _stat(pid)
    return None if fields is None else ProcessId(pid, int(fields[_STARTED]))


class WatchedProcess:
    """A process to be watched by another one that is not its parent."""

    def __init__(self, identity: ProcessId) -> None:
        """Take hold of a process.

        Raises:
            ProcessLookupError: it has gone already.
        """
        self.identity = identity
        try:
            self._handle: int | None = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            raise
        except OSError:  # a kernel before 5.3, or a sandbox without the call
            self._handle = None
        if not identity.is_alive:
            raise ProcessLookupError(identity.pid)

    def wait(self, seconds: float) -> bool:
        """Whether the process has ended; waits at most so long for it."""
        if self._handle is None:
            deadline = time.monotonic() + seconds
            while self.identity.is_alive and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(0.05, left))
            return not self.identity.is_alive
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    @property
    def state(self) -> str:
        """The kernel's letter: R running, S asleep, D waiting for a device, T or t stopped, Z dead; empty when gone."""
        fields = _stat(self.identity.pid)
        return fields[_STATE] if fields is not None and int(fields[_STARTED]) == self.identity.started else ""

    def details(self) -> dict[str, str]:
        """What the kernel says about where it waits; some of it needs privileges and is left out without them."""
        found = {}
        for name in ("wchan", "syscall", "stack"):
            text = _read(_PROC / str(self.identity.pid) / name).strip()
            if text and text != "0":
                found[name] = text[:2000]
        return found

    def descendants(self, *, but_not: int) -> list[ProcessId]:
        """Its children and theirs.

        Args:
            but_not: a child (the watchdog itself) to leave out, with its own children.
        """
        found: list[ProcessId] = []
        waiting = [self.identity.pid]
        while waiting:
            for pid in _children(waiting.pop()):
                child = identify(pid)
                if pid != but_not and child is not None and child not in found:
                    found.append(child)
                    waiting.append(pid)
        return found

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has gone."""
        try:
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)
            elif self.identity.is_alive:
                os.kill(self.identity.pid, number)
        except ProcessLookupError:
            pass


def end(processes: list[ProcessId]) -> None:
    """SIGKILL those that are still the ones they were."""
    for process in processes:
        if process.is_alive:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(_PROC / str(pid) / "task")
    except OSError:
        return []
    return [int(n) for task in tasks for n in _read(_PROC / str(pid) / "task" / task / "children").split()]


def _stat(pid: int) -> list[str] | None:
    text = _read(_PROC / str(pid) / "stat")
    return text.rsplit(")", 1)[1].split() if ")" in text else None


def _read(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
