"""How long this SLURM job has still to run, asked from the controller: limits change, and the environment may not know.

Asks `squeue` (measured: SLURM_JOB_END_TIME is not set in the steps of SLURM 22.05) for the end of the job, as seconds of
the Unix epoch, and for the time left of its limit, and believes the shorter: a preemption or a reservation moves the end,
`scontrol update TimeLimit=` both. squeue computes with this host's clock, and so does this module, so a clock that is
wrong by seconds belongs to the margin, and one that is wrong by more than some minutes cannot talk to the controller at
all (munge refuses it). Blocks for at most `TIMEOUT_S`: call it from a thread.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping

TIMEOUT_S = 20.0
_NEVER = ("UNLIMITED", "NOT_SET", "N/A", "NONE", "UNKNOWN", "")


def job_id(environment: Mapping[str, str] | None = None) -> str | None:
    """The number of the SLURM job that this process belongs to, or None."""
    found = (os.environ if environment is None else environment).get("SLURM_JOB_ID", "")
    return found if found.isdecimal() else None


def ask_time_left(job: str) -> float | None:
    """Seconds until the job ends, `math.inf` when it has no limit, None when the controller does not answer.

    Args:
        job: number of the job.
    """
    squeue = shutil.which("squeue")
    if squeue is None:
        return None
    try:
        done = subprocess.run(
            [squeue, "--noheader", f"--jobs={job}", "--format=%e|%L"],
            env={**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            start_new_session=True,  # signals to our group are not for it
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    lines = done.stdout.strip().splitlines()
    return parse_answer(lines[0], now=time.time()) if done.returncode == 0 and lines else None


def parse_answer(line: str, *, now: float) -> float | None:
    """Read squeue's "end|time left".

    Args:
        line: for example `1764037284|1-02:03:04`; the end may also be a local time such as `2026-11-25T03:21:24`.
        now: Unix seconds.
    """
    end, separator, left = line.strip().partition("|")
    if not separator:
        return None
    candidates = [
        value for value in (_seconds_until(end.strip(), now), parse_duration(left.strip())) if value is not None
    ]
    return min(candidates) if candidates else None


def parse_duration(text: str) -> float | None:
    """Seconds of SLURM's `[days-][[hours:]minutes:]seconds`; inf when there is no limit, 0 when it has passed."""
    if text.upper() in _NEVER:
        return float("inf") if text.upper() == "UNLIMITED" else None
    if text.upper() == "INVALID":  # what squeue makes of a negative duration: the job runs beyond its limit
        return 0.0
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def end_from_environment(environment: Mapping[str, str] | None = None, *, now: float) -> float | None:
    """Seconds left by SLURM_JOB_END_TIME, where SLURM sets it: what was known when the job began.

    Args:
        environment: defaults to the process environment.
        now: Unix seconds.
    """
    text = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME", "")
    return _seconds_until(text, now)


def _seconds_until(text: str, now: float) -> float | None:
    if text.upper() in _NEVER:
        return None
    if text.isdecimal():
        end = float(text)
    else:
        try:
            end = time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))  # local time, as squeue writes it
        except (ValueError, OverflowError):
            return None
    return max(0.0, end - now) if end > 0 else None
