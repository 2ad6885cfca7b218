"""The process between supervisor and launcher: when either dies, it lets the ranks save and leaves nothing behind.

    python -m dstrain.launcher.keeper GRACE_S COMMAND [ARGUMENT ...]

`deepspeed` leaves its ranks running when it is killed, and a supervisor killed with SIGKILL cannot clean up. The keeper starts
the launcher and waits for the first of two ends: the launcher's, or that of its own standard input, a pipe whose other end
only the supervisor holds. Then it asks the ranks that are left to save and leave, waits, kills the rest and exits with the
launcher's code (128 + n for signal n). Signals that ask for a stop do not end it: SLURM sends them to every process of a step.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from types import FrameType

from dstrain.launcher.process_group import POLL_S, ProcessGroup
from dstrain.launcher.starters import TOKEN

_PR_SET_CHILD_SUBREAPER = 36
_ENDURED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: list[str]) -> int:
    """Keep one launcher; returns its exit code."""
    grace_s, command = float(arguments[0]), arguments[1:]
    for number in _ENDURED:
        signal.signal(number, _endure)  # a handler, not SIG_IGN, which the launcher would inherit
    _adopt_orphans()
    group = ProcessGroup(os.environ[TOKEN])
    try:
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        _say(f"error: {command[0]}: cannot be started: {error}")
        return 127
    while launcher.poll() is None:
        if select.select([0], [], [], POLL_S)[0] and not os.read(0, 1):
            _say("the supervisor is gone: asking the ranks to save and leave")
            break
    group.wind_down(grace_s=grace_s)
    code = launcher.wait()
    return code if code >= 0 else 128 - code


def _endure(number: int, frame: FrameType | None) -> None:
    """Do nothing."""


def _say(text: str) -> None:
    sys.stderr.write(f"dstrain: {text}\n")
    sys.stderr.flush()


def _adopt_orphans() -> None:
    """Become the parent of what loses its own, instead of init: orphans then stay in this job's process tree (best effort)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
