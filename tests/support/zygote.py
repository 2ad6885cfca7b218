"""Ranks in tens of milliseconds: a process that has imported torch, DeepSpeed and dstrain once and forks ranks on demand.

A test that kills or signals hundreds of training runs would spend nearly all its time importing. The zygote imports,
opens nothing, starts no thread, and then forks one process per rank; each is a session of its own with its own environment
and log, and runs the command line just as `launch/*.py` do, or a module of the tests. What it cannot show is the time before
the imports are done: use `tests.support.runs.pretrain_job` for that.

    with Zygote(tmp_path / "zygote.log") as zygote:
        with zygote.start_ranks(config, "train.max_steps=6", world_size=2) as job:
            job.signal(signal.SIGTERM, ranks=[1])
            assert job.wait() == [75, 75], job.output()

One zygote serves one thread of one test process. Ranks are signalled through pidfds, so never a process that merely has
the same number. When the test process dies, the zygote kills the ranks that it still has and leaves.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the folder of the repository is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.runs import ROOT, Job, free_port

_SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}  # fmt: skip


class ForkedProcess:
    """One rank, with the part of Popen's interface that `Job` uses."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._zygote, self._handle = zygote, os.pidfd_open(pid)  # the zygote reaps only when asked: the number is ours

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code when it has ended: negative for a signal, as Popen has it."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Signal it unless it has ended."""
        if self.returncode is None:
            try:
                signal.pidfd_send_signal(self._handle, number)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._handle, select.POLLIN)
            if poller.poll(None if timeout is None else timeout * 1000):
                self.returncode = os.waitstatus_to_exitcode(self._zygote.ask({"reap": self.pid}))
                os.close(self._handle)
        return self.returncode


class ForkedJob(Job):
    """N forked ranks of one command; used just like `Job`."""

    def __init__(
        self, zygote: Zygote, argv: list[str], *, world_size: int, log_folder: Path, environment: dict[str, str]
    ) -> None:
        log_folder.mkdir(parents=True, exist_ok=True)
        self.logs = [log_folder / f"rank-{rank}.log" for rank in range(world_size)]
        common = {
            **os.environ, **_SINGLE_THREADED, "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment,
        }  # fmt: skip
        self.processes = [  # type: ignore[assignment]
            ForkedProcess(
                zygote,
                zygote.ask(
                    {"argv": argv, "log": str(log), "env": {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}}
                ),
            )
            for rank, log in enumerate(self.logs)
        ]


class Zygote:
    """The forking process; a context manager."""

    def __init__(self, log: Path) -> None:
        """Start it and wait for its imports (seconds).

        Args:
            log: where its own output goes; ranks have logs of their own.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
                cwd=ROOT, env={**os.environ, **_SINGLE_THREADED}, start_new_session=True,
            )  # fmt: skip
        self._read()

    def start_ranks(
        self,
        config: Path,
        *overrides: str,
        world_size: int = 2,
        stage: str = "pretrain",
        environment: dict[str, str] | None = None,
    ) -> ForkedJob:
        """Start `dstrain STAGE --config CONFIG key=value...` on every rank, as a launcher would."""
        logs = config.parent / f"logs-{config.stem}-{world_size}-{time.monotonic_ns()}"
        argv = [stage, "--config", str(config), *overrides]
        return ForkedJob(self, argv, world_size=world_size, log_folder=logs, environment=environment or {})

    def start_module(self, module: str, *arguments: str, log_folder: Path, world_size: int = 2) -> ForkedJob:
        """Start `python -m MODULE ARGUMENT...` on every rank."""
        argv = ["-m", module, *arguments]
        return ForkedJob(self, argv, world_size=world_size, log_folder=log_folder, environment={})

    def ask(self, request: dict[str, Any]) -> int:
        """One request, one number."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it, and with it whatever ranks it still has."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(60)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the zygote died:\n{self._log.read_text(errors='replace')[-3000:]}"
        return int(line)


def _import_everything() -> None:
    """What a run imports, also late; what is missing here costs time, never correctness."""
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imports torch's compiler, in every run
    import torch.distributed  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.modernbert.modeling_modernbert  # noqa: F401

    import dstrain.cli.main
    import dstrain.stages.finetune
    import dstrain.stages.pretrain  # noqa: F401


def _serve() -> list[str]:
    """Fork until the test process is gone; returns, in a forked rank only, the arguments of its command."""
    _import_everything()
    gc.collect()
    gc.freeze()  # so that a collection in a rank does not copy every page
    requests, answers = os.fdopen(0, "rb", closefd=False), os.fdopen(1, "wb", closefd=False)
    children: set[int] = set()
    _answer(answers, 0)
    for line in requests:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            children.discard(request["reap"])
            _answer(answers, status)
            continue
        pid = os.fork()
        if pid == 0:
            _become_rank(request)
            return list(request["argv"])
        children.add(pid)
        _answer(answers, pid)
    for pid in children:  # not reaped yet, so these numbers are still theirs
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _answer(answers: Any, number: int) -> None:
    answers.write(f"{number}\n".encode())
    answers.flush()


def _become_rank(request: dict[str, Any]) -> None:
    """A session, an environment, a log; nothing left of the zygote's pipes."""
    os.setsid()
    nowhere, log = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
    )
    for source, target in ((nowhere, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nowhere)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])


def _leave(command: Callable[[], int]) -> None:
    """End as an interpreter does, threads joined and exit functions run, but for taking its modules apart: 2 s of nothing."""
    code = 1
    try:
        code = command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter does at its top
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(arguments: list[str]) -> int:
    """The command of a forked rank."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    from dstrain.cli.main import main

    sys.argv = ["dstrain", *arguments]
    return main(arguments)


if __name__ == "__main__":
    given = _serve()
    _leave(lambda: _run(given))
