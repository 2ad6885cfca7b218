"""The processes of one attempt, found by the mark in their environment; asked, waited for and killed, and no others.

A mark is a token that no other process carries. It is inherited by everything the launcher starts, stays with orphans whose
launcher has died, and does not depend on names, sessions or parents. Sees this machine only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from dstrain.launcher.starters import TOKEN

POLL_S = 0.1
_KILL_POLL_S = 0.01
KILL_WAIT_S = 10.0
"""Seconds after SIGKILL from which a process counts as unkillable (stuck in a driver or a file system)."""


class ProcessGroup:
    """Everything that carries a token, apart from named processes."""

    def __init__(self, token: str, *, spare: Iterable[int] = ()) -> None:
        """Name the group.

        Args:
            token: value of the marking environment variable.
            spare: process ids that carry it too but are not to be touched (the keeper).
        """
        self.token = token
        self._mark = f"{TOKEN}={token}".encode()
        self._spare = {os.getpid(), *spare}

    def members(self) -> list[psutil.Process]:
        """Living processes of the group; dead ones that nobody has reaped are not."""
        return [process for pid in _pids() if pid not in self._spare and (process := self._member(pid)) is not None]

    def ranks(self) -> dict[psutil.Process, int]:
        """The ranks and their numbers: the topmost processes with RANK, neither launchers above nor loader workers below."""
        numbers: dict[psutil.Process, int] = {}
        for process in self.members():
            with suppress(psutil.Error, KeyError, ValueError):
                numbers[process] = int(process.environ()["RANK"])
        return {process: numbers[process] for process in _topmost(numbers)}

    def to_ask(self) -> list[psutil.Process]:
        """Who is asked to stop: the ranks, or the topmost processes where there are none.

        That is so for one plain process, for srun, and for a launcher that is still starting.
        """
        return list(self.ranks()) or _topmost(self.members())

    def kill(self) -> list[int]:
        """SIGKILL until nothing is left; returns the ids of what would not die."""
        deadline = time.monotonic() + KILL_WAIT_S
        while left := self.members():  # again and again: one may have started another meanwhile
            for process in left:
                send(process, signal.SIGKILL)
            time.sleep(_KILL_POLL_S)  # psutil's own waiting would reap children and take their exit codes from us
            if time.monotonic() > deadline:
                return sorted(process.pid for process in self.members())
        return []

    def wind_down(self, *, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> list[int]:
        """Ask the ranks to save and leave, wait, then kill what is left.

        Args:
            grace_s: seconds they have.
            hurry: asked ten times a second; True ends the wait.

        Returns:
            Ids of processes that would not die even so.
        """
        asked: set[psutil.Process] = set()
        deadline = time.monotonic() + grace_s
        while self.members():
            for rank in self.to_ask():
                if rank not in asked:
                    ask(rank, signal.SIGTERM)
                    asked.add(rank)
            if time.monotonic() > deadline or hurry():
                return self.kill()
            time.sleep(POLL_S)
        return []

    def _member(self, pid: int) -> psutil.Process | None:
        try:
            if self._mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return None
            process = psutil.Process(pid)  # remembers the start time: a reused id is not signalled
            return process if process.environ().get(TOKEN) == self.token else None
        except (OSError, psutil.Error):
            return None


def ask(process: psutil.Process, number: signal.Signals) -> None:
    """Ask a process to stop; srun, which takes SIGTERM for "kill the ranks at once", is told to pass SIGUSR1 on to them."""
    with suppress(psutil.Error):
        send(process, signal.SIGUSR1 if process.name() == "srun" else number)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal; a process that is gone, or whose id was taken by another, gets none."""
    with suppress(psutil.Error):
        process.send_signal(number)


def _topmost(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    chosen = list(processes)
    ids = {process.pid for process in chosen}
    found = []
    for process in chosen:
        with suppress(psutil.Error):
            if process.ppid() not in ids:
                found.append(process)
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
