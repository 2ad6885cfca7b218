"""One attempt: start the launcher under a keeper, pass stop requests on to the ranks, end it as a whole, leave nothing.

Does not judge how it ended and does not start again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from dstrain.base.errors import StorageError
from dstrain.launcher.outcome import GRACEFUL, read_exits
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.process_group import ProcessGroup, ask
from dstrain.launcher.stop_signals import StopSignals

_POLL_S = 0.1
_LOOK_S = 1.0


@dataclass(frozen=True)
class AttemptEnd:
    """What is left of an attempt."""

    launcher_code: int
    """0 to 255, or minus n when the keeper itself was killed by signal n."""
    unkillable: tuple[int, ...]
    """Process ids that survived SIGKILL."""


class Attempt:
    """A running attempt; a context manager that ends it whatever happens."""

    def __init__(
        self, argv: tuple[str, ...], environment: Mapping[str, str], *, token: str, log: Path, policy: RestartPolicy,
        run_folder: Path, local_ranks: int, say: Callable[[str], None], ranks_elsewhere: bool = False,
    ) -> None:  # fmt: skip
        """Start the keeper, and through it the launcher.

        Args:
            argv: the launcher's command.
            environment: its whole environment, the token in it.
            token: the mark of its processes.
            log: file that collects the output of launcher and ranks.
            policy: for its times.
            run_folder: where ranks leave their exit files.
            local_ranks: how many ranks of this machine leave exit files; when one dies without, the others are ended. 0: not watched.
            say: prints a line for people.
            ranks_elsewhere: whether ranks of other machines leave exit files; when one says that it failed, a launcher that does
                not end is ended. Over ssh it may wait for ever for a machine that has lost its network.

        Raises:
            StorageError: the log cannot be written.
        """
        self._policy, self._run_folder, self._local_ranks, self._say = policy, run_folder, local_ranks, say
        self._ranks_elsewhere = ranks_elsewhere
        self._asked: dict[psutil.Process, int] = {}
        self._requests = 0
        self._deadline: float | None = None
        self._dead_since: float | None = None
        keeper = [sys.executable, "-m", "dstrain.launcher.keeper", str(policy.grace_s), *argv]
        try:
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{log}: cannot be written: {error}") from None
        try:
            self._keeper = subprocess.Popen(
                keeper,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=handle,
                start_new_session=True,
            )
        finally:
            os.close(handle)
        self.group = ProcessGroup(token, spare=[self._keeper.pid])

    def run(self, stop: StopSignals) -> AttemptEnd:
        """Wait for the end; stop signals that have come or come meanwhile are passed on to the ranks."""
        next_look = time.monotonic()
        while True:
            try:
                code = self._keeper.wait(timeout=_POLL_S)
                break
            except subprocess.TimeoutExpired:
                pass
            self._pass_on(stop)
            if time.monotonic() >= next_look:
                self._look_at_ranks()
                next_look = time.monotonic() + _LOOK_S
        # The keeper leaves nothing, unless it was killed itself.
        left = self.group.wind_down(grace_s=self._policy.grace_s, hurry=lambda: len(stop.received) > self._requests)
        return AttemptEnd(code, tuple(left))

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper.poll() is None:  # only after an exception
            self.group.kill()
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()
        self._keeper.wait()

    def _pass_on(self, stop: StopSignals) -> None:
        requests = len(stop.received)
        if requests == 0:
            return
        now, last = time.monotonic(), stop.received[-1]
        if requests > self._requests:
            allowed_s = self._policy.grace_s if requests == 1 else self._policy.hurry_grace_s if requests == 2 else 0.0
            self._deadline = min(self._deadline or now + allowed_s, now + allowed_s)
            self._requests = requests
            self._say(f"{last.name}: asking the ranks to save and leave; they have {self._deadline - now:.0f} s")
        for rank in self.group.to_ask():  # also those that appear only now
            if self._asked.get(rank, 0) < requests:
                ask(rank, signal.SIGTERM if last == signal.SIGHUP else last)  # ranks know no SIGHUP
                self._asked[rank] = requests
        if self._deadline is not None and now > self._deadline:
            self._say("the time is up: killing what has not left")
            self.group.kill()

    def _look_at_ranks(self) -> None:
        """Notice a rank that has died; the others then have some seconds, for a collective may never come back."""
        dead = self._dead_elsewhere() if self._ranks_elsewhere else self._dead_here()
        if not dead:
            self._dead_since = None
            return
        now = time.monotonic()
        self._dead_since = self._dead_since or now
        if now - self._dead_since > self._policy.peer_grace_s:
            self._say(
                f"rank {dead[0]} is gone, what is left did not follow in {self._policy.peer_grace_s:.0f} s: killing it"
            )
            self.group.kill()

    def _dead_here(self) -> list[int]:
        present = set(self.group.ranks().values()) if self._local_ranks else set()
        gone = set(range(self._local_ranks)) - present
        if not present or not gone:  # before the first rank is there; and files are read only when one is missing
            return []
        return sorted(gone - {left.rank for left in read_exits(self._run_folder) if left.code in GRACEFUL})

    def _dead_elsewhere(self) -> list[int]:
        return [left.rank for left in read_exits(self._run_folder) if left.code not in GRACEFUL]
