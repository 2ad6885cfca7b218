"""What a dead or hanging process leaves behind: the end of its stacks file, a crash's headline, the kernel's count of kills.

Reads only, and finds nothing where nothing can be read. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path


def last_crash(stacks: Path) -> str:
    """The headline that faulthandler leaves when a process crashes, such as "Segmentation fault"."""
    lines = [line for line in tail(stacks).splitlines() if line.startswith("Fatal Python error: ")]
    return lines[-1].removeprefix("Fatal Python error: ") if lines else ""


def tail(path: Path, *, limit_bytes: int = 1 << 18) -> str:
    """The end of a file as text, or nothing."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit_bytes))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def oom_kills() -> int:
    """Processes of this host that the kernel has ended for lack of memory, since it started."""
    for line in tail(Path("/proc/vmstat")).splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0
