"""How a command's process ends: as Python ends one, but without taking the interpreter apart.

While Python 3.10 to 3.13 takes itself apart, a thread that comes back from torch's C++ is unwound, which C++ answers with "terminate
called without an active exception" and SIGABRT: a finished run would be told as a crash. It takes a thread of gloo's that still
frees the tensors of a last collective (ZeRO stage 3 has them in flight), or one that makes data. So threads that are to be waited for are,
exit functions run, output is flushed, and then the process leaves. Chooses no exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_TRACEBACK = 1


def run_and_leave(command: Callable[[], int]) -> NoReturn:
    """Run a command as the last thing this process does, and leave with its code.

    To be called before anything else registers an exit function: the first registered is run last.

    Args:
        command: returns the exit code.
    """
    code = _TRACEBACK

    def leave() -> None:
        logging.shutdown()  # was registered before
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader has left, or it is closed
                stream.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        code = command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    sys.exit(code)
