"""Who runs the tasks of a build: this process, a pool of spawned ones, or one of several jobs that share a file system.

Every executor gets the whole list, skips what is done, and runs the same `run_task`, so all give the same bytes. After
a fault no task is started any more, those under way are let finish, and the rerun goes on from there. `ray_executor`
has one for Ray.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from dstrain.base.errors import ConfigError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.progress import bar
from dstrain.corpus.build_tasks import Job, Task, run_task
from dstrain.foreign.pool import start_pool

_LOG = get_logger(__name__)
_POLL_S = 2.0
_TITLES = {"scan": "looking at inputs", "map": "reading text", "reduce": "tokenising"}
DEFAULT_WAIT_S = 3600.0


class Executor(Protocol):
    """Runs tasks until all of a list are done; a context manager that holds its processes for several lists."""

    def __enter__(self) -> object: ...

    def __exit__(self, *fault: object) -> None: ...

    def run(self, job: Job, tasks: Sequence[Task], *, quiet: bool) -> None:
        """Return once every task is finished, here or elsewhere.

        Raises:
            DstrainError: a task failed, or others did not finish theirs in time.
        """
        ...


class InProcess:
    """All tasks one after another in this process; the tokenizer library may use threads."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *fault: object) -> None:
        pass

    def run(self, job: Job, tasks: Sequence[Task], *, quiet: bool) -> None:
        """Run what is missing."""
        with progress(job, tasks, quiet=quiet) as steps:
            for task in steps.missing:
                steps.finished(task, run_task(job, task, steps.within))


class SpawnPool:
    """Tasks in spawned processes with one tokenizing thread each, which leave when this process dies."""

    def __init__(self, workers: int):
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> SpawnPool:
        self._pool = start_pool(self._workers, single_threaded)  # starts no process before there is a task
        return self

    def __exit__(self, *fault: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, job: Job, tasks: Sequence[Task], *, quiet: bool) -> None:
        """Run what is missing."""
        assert self._pool is not None, "with SpawnPool(...)"
        with progress(job, tasks, quiet=quiet) as steps:
            try:
                self._run(self._pool, job, steps)
            except BrokenProcessPool as error:
                raise StorageError(
                    "a building process was killed, mostly for want of memory: use fewer --workers; finished tasks stay"
                ) from error

    def _run(self, pool: ProcessPoolExecutor, job: Job, steps: Progress) -> None:
        # The largest first, so that no process is left alone with one at the end. The order decides no byte.
        waiting = list(steps.missing) if job.is_shared else sorted(steps.missing, key=lambda task: -task.weight)
        under_way: dict[Future[dict[str, Any] | None], Task] = {}
        while waiting or under_way:
            while waiting and len(under_way) < 2 * self._workers:
                task = waiting.pop(0)
                under_way[pool.submit(run_task, job, task)] = task
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                steps.finished(under_way.pop(future), future.result())


class ArrayShare:
    """One of `count` jobs that share a file system: its own share of every list first, then what others leave.

    A task is claimed while it runs, so no two jobs run it and the claim of a dead job ends. Jobs that wait in the queue,
    or die, are not waited for: whoever runs does their tasks.
    """

    def __init__(self, index: int, count: int, *, inner: Executor, wait_s: float = DEFAULT_WAIT_S):
        """Choose the share.

        Args:
            index: which of the `count` jobs this is, from 0.
            count: number of jobs.
            inner: runs the tasks.
            wait_s: longest wait, in seconds, for tasks that others claim without any of them being finished.

        Raises:
            ConfigError: index and count do not fit.
        """
        if not 0 <= index < count:
            raise ConfigError(f"--task-index {index} of --num-tasks {count}: the index goes from 0 to {count - 1}")
        self.index, self.count, self._inner, self._wait_s = index, count, inner, wait_s

    def __enter__(self) -> ArrayShare:
        self._inner.__enter__()
        return self

    def __exit__(self, *fault: object) -> None:
        self._inner.__exit__(*fault)

    def run(self, job: Job, tasks: Sequence[Task], *, quiet: bool) -> None:
        """Run until every task is finished, here or elsewhere."""
        shared = dataclasses.replace(job, is_shared=True)
        missing, since, is_first = self._ordered(tasks), time.monotonic(), True
        while missing:
            self._inner.run(shared, missing, quiet=quiet or not is_first)
            is_first = False
            left = [task for task in missing if task.name not in job.work]
            if len(left) < len(missing):
                missing, since = left, time.monotonic()
                continue
            self._check(job, missing, waited_s=time.monotonic() - since)
            time.sleep(min(_POLL_S, self._wait_s / 4))

    def _ordered(self, tasks: Sequence[Task]) -> list[Task]:
        own = list(tasks[self.index :: self.count])
        # The others' from the end, where they come to last.
        rest = [task for number, task in enumerate(tasks) if number % self.count != self.index]
        return own + rest[::-1]

    def _check(self, job: Job, missing: Sequence[Task], *, waited_s: float) -> None:
        if not job.work.path.exists():
            raise StorageError(f"{job.work.path} is gone: the build was finished or deleted by another job")
        if waited_s > self._wait_s:
            claims = ", ".join(task.name for task in missing[:3])
            raise StorageError(
                f"waited {self._wait_s:.0f} s for {len(missing)} {missing[0].kind} tasks that other jobs have claimed, and "
                f"none was finished: stop the jobs named in {job.work.path}/claims ({claims}), then start this again. "
                "Finished tasks stay"
            )


def array_position(index: int | None, count: int | None, environ: Mapping[str, str]) -> tuple[int, int]:
    """Which share of how many: what was given, else what SLURM's array says.

    Args:
        index: --task-index.
        count: --num-tasks.
        environ: the environment; SLURM_ARRAY_TASK_ID, _MIN and _COUNT are read for what is None.

    Raises:
        ConfigError: neither tells.
    """
    try:
        if index is None:
            index = int(environ["SLURM_ARRAY_TASK_ID"]) - int(environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        if count is None:
            count = int(environ["SLURM_ARRAY_TASK_COUNT"])
    except (KeyError, ValueError):
        raise ConfigError("give --task-index and --num-tasks, or run inside a SLURM array, which sets both") from None
    return index, count


def single_threaded() -> None:
    """Bound what a process of many uses: its neighbours have the other cores."""
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass
class Progress:
    """A bar over a list of tasks, in bytes of their inputs, and the rate of what was tokenised."""

    missing: list[Task]
    _update: Callable[[int], object]
    _note: Callable[[str], object]
    _within: int = 0
    _tokens: int = 0
    _cpu_seconds: float = 0.0

    def within(self, size: int) -> None:
        """Count bytes of the task that runs in this process."""
        self._within += size
        self._update(size)

    def finished(self, task: Task, result: Mapping[str, Any] | None) -> None:
        """Count a whole task, unless another job is at it."""
        if result is None:
            return
        self._update(task.weight - self._within)
        self._within = 0
        self._tokens += result.get("tokens", 0)
        self._cpu_seconds += result["cost"]["cpu_seconds"]
        if self._tokens:
            self._note(f"{self._tokens / max(self._cpu_seconds, 1e-9) / 1e6:.2f} Mtok/s per core")


@contextmanager
def progress(job: Job, tasks: Sequence[Task], *, quiet: bool) -> Iterator[Progress]:
    """What is missing of a list, under a bar that starts with what is done."""
    done = job.work.done()
    missing = [task for task in tasks if task.name not in done]
    title = _TITLES[tasks[0].kind] if tasks else ""
    with bar(total=sum(task.weight for task in tasks), description=title, unit="B", quiet=quiet or not tasks) as shown:
        if len(missing) < len(tasks):
            # As the bar's start, so that the forecast counts only what this call does.
            shown.initial = shown.n = sum(task.weight for task in tasks if task.name in done)
        yield Progress(missing, shown.update, lambda text: shown.set_postfix_str(text, refresh=False))
