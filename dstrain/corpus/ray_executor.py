"""The door to Ray: build tasks on a Ray cluster whose nodes share the inputs' and the output's file system.

The same `run_task` as everywhere, one CPU each. Ray's own retries are off: a task that died with its node is started
again by the next call, as with every executor. Needs `pip install dstrain[ray]` on all nodes.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions

from dstrain.base.errors import MachineError, StorageError
from dstrain.corpus.build_tasks import Job, Task, run_task
from dstrain.corpus.executors import Progress, progress, single_threaded

_CONNECT_S = 10.0


class OnRay:
    """Tasks on a Ray cluster, or on a Ray that is started here and ends with the context."""

    def __init__(self, *, address: str | None = None, workers: int = 1):
        """Name the cluster; `with` connects to it.

        Args:
            address: of a running cluster ("auto" finds one); None starts Ray on this machine.
            workers: CPUs of a Ray that is started here, and tasks under way at a time per CPU found.
        """
        self._workers = workers
        self._address = address

    def __enter__(self) -> OnRay:
        """Connect.

        Raises:
            MachineError: there is no such cluster.
        """
        _check_reachable(self._address)
        local = {"num_cpus": self._workers, "include_dashboard": False} if self._address is None else {}
        try:
            ray.init(address=self._address or "local", log_to_driver=False, logging_level="error", **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise MachineError(f"--ray-address {self._address or 'local'}: {error}") from error
        self._workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def run(self, job: Job, tasks: Sequence[Task], *, quiet: bool) -> None:
        """Run what is missing."""
        with progress(job, tasks, quiet=quiet) as steps:
            try:
                self._run(job, steps)
            except ray.exceptions.RayTaskError as error:
                # Ours are made to be shown; anything else keeps Ray's trace of the far side.
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except ray.exceptions.RayError as error:
                raise StorageError(
                    f"Ray lost a building process or node: {error}. Finished tasks stay: run again"
                ) from error

    def _run(self, job: Job, steps: Progress) -> None:
        remote = ray.remote(num_cpus=1, max_retries=0)(_run_single_threaded)
        waiting = sorted(steps.missing, key=lambda task: -task.weight)
        under_way: dict[Any, Task] = {}
        try:
            while waiting or under_way:
                while waiting and len(under_way) < 2 * self._workers:
                    task = waiting.pop(0)
                    under_way[remote.remote(job, task)] = task
                done, _ = ray.wait(list(under_way), num_returns=1)
                for reference in done:
                    steps.finished(under_way.pop(reference), ray.get(reference))
        finally:
            if under_way:
                ray.wait(list(under_way), num_returns=len(under_way), timeout=60)


def _check_reachable(address: str | None) -> None:
    """Ray itself tries a wrong address for many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise MachineError(f"--ray-address {address}: nobody answers there: {error}") from None


def _run_single_threaded(job: Job, task: Task) -> dict[str, Any] | None:
    single_threaded()
    return run_task(job, task)
