"""How a rank ended, in a small file: launchers and schedulers lose exit codes, the run folder does not.

`exit/rank-00000.json` says what, why and what to do now; a rank that was killed leaves none, and the files of an earlier
attempt are removed when the next one begins. Reading them and judging the whole job is the launcher's.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dstrain.base.errors import DstrainError, ExitCode, PeerError, PeerGoneError
from dstrain.base.secrets import redact
from dstrain.base.storage import make_directory, remove_file, write_json
from dstrain.base.world import World

FOLDER = "exit"
Kind = Literal["complete", "request", "fault", "peer", "defect", "interrupt"]

ADVICE = {
    ExitCode.COMPLETE: "nothing to do",
    ExitCode.DEFECT: "report it, with the traceback in the log",
    ExitCode.USAGE: "mend the command",
    ExitCode.SAVED_REQUEUE: "start the same command again to go on",
    ExitCode.RETRY_HERE: "start the same command again, a few times at most",
    ExitCode.UNHEALTHY_NODE: "start the same command on another machine",
    ExitCode.BAD_INPUT: "mend the input first: the same command fails again",
    ExitCode.NO_PROGRESS: "cancel jobs that wait for this run, and look at its numbers",
    ExitCode.RUN_IN_USE: "wait for the other job, or set another run_folder",
    ExitCode.NOTHING_TO_RESUME: "check run_folder, or set train.resume: auto to start anew",
    ExitCode.SAVED_END: "remove the stop file or raise the budget, then start the same command again to go on",
}
_LONGEST = 500


@dataclass(frozen=True)
class Ending:
    """Why a rank ends."""

    code: ExitCode
    kind: Kind
    cause: str
    """One sentence for people."""


def ending_of(error: BaseException) -> Ending:
    """The ending that an exception means; its text is one line, without secrets, and not long."""
    text = _short(str(error))
    if isinstance(error, (PeerError, PeerGoneError)):
        return Ending(ExitCode(error.exit_code), "peer", text)
    if isinstance(error, DstrainError):
        return Ending(ExitCode(error.exit_code), "fault", text)
    if isinstance(error, KeyboardInterrupt):
        return Ending(ExitCode.DEFECT, "interrupt", "interrupted by a person, without a save")
    name = type(error).__name__
    return Ending(ExitCode.DEFECT, "defect", f"{name}: {text}" if text else name)


def write_exit(
    run_folder: Path,
    world: World,
    *,
    code: ExitCode,
    cause: str,
    step: int | None,
    kind: Kind | None = None,
    signal: str | None = None,
    phase: str = "",
    last_saved_step: int | None = None,
    attempt: int = 0,
) -> None:
    """Leave `exit/rank-00000.json`; best effort, because it is written when things may be broken already.

    Args:
        run_folder: of the run.
        world: this rank.
        code: it leaves with.
        cause: one sentence.
        step: optimizer steps done; None before that is known.
        kind: of ending; by default what the code mostly means.
        signal: name of the stop signal that this rank got.
        phase: what it was doing.
        last_saved_step: step of the newest checkpoint that this job knows to be on disk.
        attempt: epoch of the run's lease.
    """
    try:
        folder = run_folder / FOLDER
        make_directory(folder)
        write_json(
            folder / f"rank-{world.rank:05d}.json",
            {
                "code": int(code),
                "name": code.name.lower(),
                "kind": kind or _usual_kind(code),
                "cause": _short(cause),
                "advice": ADVICE[code],
                "signal": signal,
                "phase": phase,
                "step": step,
                "last_saved_step": last_saved_step,
                "attempt": attempt,
                "rank": world.rank,
                "world_size": world.size,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": time.time(),
            },
        )
    except DstrainError:
        pass


def clear_exits(run_folder: Path) -> None:
    """Remove the files of an earlier attempt; rank 0 only, and only while it holds the run's lease. Best effort."""
    for path in sorted((run_folder / FOLDER).glob("rank-*.json")):
        try:
            remove_file(path)
        except DstrainError:
            pass


def _usual_kind(code: ExitCode) -> Kind:
    if code is ExitCode.COMPLETE:
        return "complete"
    if code in (ExitCode.SAVED_REQUEUE, ExitCode.SAVED_END):
        return "request"
    return "defect" if code is ExitCode.DEFECT else "fault"


def _short(text: str) -> str:
    line = " ".join(redact(text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
