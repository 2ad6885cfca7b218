"""Spawned worker processes that leave when their parent does, however it died.

An idle `ProcessPoolExecutor` worker whose parent was killed would wait for ever, because it holds both ends of its
queue. Here each worker watches the pipe that only the parent holds open. Spawned, never forked: a used tokenizer has
threads.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def start_pool(workers: int, start: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool of spawned processes, each of which first runs `start(*arguments)`.

    Args:
        workers: number of processes; they are started as they are needed.
        start: a module's function.
        arguments: what it gets; sent to the processes.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(start, arguments))


def _prepare(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # The parent decides when to stop; a worker that prints a traceback at ctrl-C only hides the reason.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, name="dstrain-parent-watch", daemon=True).start()
    start(*arguments)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
