"""Start, watch, judge, start again: the loop around one job, with every decision said and written down.

The decisions are `policy`'s, the processes are `attempt`'s; this joins them with the run folder. It is no rank: it holds no
lease, touches no tensor, and a run that is supervised is the same run.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dstrain.base.errors import ExitCode
from dstrain.base.storage import make_directory, write_text
from dstrain.base.world import free_port
from dstrain.launcher.attempt import Attempt, AttemptEnd
from dstrain.launcher.history import TRAINING, AttemptRecord, History
from dstrain.launcher.hosts import render_hostfile
from dstrain.launcher.outcome import Outcome, judge, read_exits
from dstrain.launcher.output import LogFollower
from dstrain.launcher.policy import Decision, Ended, RestartPolicy, Standing, decide
from dstrain.launcher.run_files import (
    LOGS,
    Progress,
    progress_of,
    put_back,
    put_exits_away,
    set_newest_aside,
)
from dstrain.launcher.starters import Command, Layout, build_command, rank_log
from dstrain.launcher.stop_signals import StopSignals

_SHOWN_ENDS = 3


@dataclass(frozen=True)
class Job:
    """What is supervised."""

    stage: str
    run_folder: Path
    arguments: tuple[str, ...]
    """What stands behind `dstrain`: the stage, its configuration and overrides."""
    layout: Layout
    seed: int = 0
    """Of the run."""
    port: int | None = None
    """TCP port of the rendezvous; None takes a free one at each start."""

    @property
    def trains(self) -> bool:
        """Whether it writes checkpoints and exit files."""
        return self.stage in TRAINING


class Supervisor:
    """Runs one job to its end."""

    def __init__(
        self, job: Job, policy: RestartPolicy, *, say: Callable[[str], None], out: BinaryIO,
        environment: Mapping[str, str] | None = None,
        build: Callable[..., Command] = build_command,
    ) -> None:  # fmt: skip
        """Prepare; nothing is started.

        Args:
            job: what.
            policy: when to start again.
            say: prints a line for people.
            out: where the output of launcher and ranks goes, besides the log.
            environment: what the launcher inherits; default: ours.
            build: makes the launcher's command.
        """
        self._job, self._policy, self._say, self._out = job, policy, say, out
        self._environment = dict(os.environ if environment is None else environment)
        self._build = build
        self._aside: tuple[Path, int] | None = None

    def run(self) -> ExitCode:
        """Start the job until it is complete, asked to stop, or given up.

        Returns:
            The code for whoever started the supervisor (docs/exit-codes.md).

        Raises:
            ConfigError: the layout cannot be started.
            StorageError: the run folder cannot be written.
        """
        make_directory(self._job.run_folder / LOGS)
        self._history = History(self._job.run_folder, say=self._say)
        before = self._progress()
        standing = Standing(self._job.layout.hosts, before.checkpoint, before.reached)
        with StopSignals() as stop:
            while True:
                ended = self._attempt(standing, before, stop)
                standing, decision = decide(self._policy, standing, ended, seed=self._job.seed)
                before = self._settle(standing, ended, decision)
                if decision.code is not None:
                    return decision.code
                if stop.wait(decision.wait_s):
                    self._say("asked to stop between two starts; the same command goes on from the newest checkpoint")
                    return ExitCode.SAVED_REQUEUE

    def _attempt(self, standing: Standing, before: Progress, stop: StopSignals) -> Ended:
        job, number = self._job, self._history.next_number
        if job.trains:
            put_exits_away(job.run_folder, before_attempt=number)
        log = job.run_folder / LOGS / f"attempt-{number:04d}.log"
        shown = [log, rank_log(log.with_suffix(""), 0)] if job.layout.starter == "srun" else [log]
        for path in shown:
            path.touch(mode=0o600)
        command, token = self._command(standing, number, rank_logs=log.with_suffix("")), uuid.uuid4().hex
        layout = job.layout.on(standing.hosts)
        where = f" on {', '.join(host.name for host in standing.hosts)}" if standing.hosts else ""
        start = f"from step {before.checkpoint}" if before.checkpoint >= 0 else "from the beginning"
        self._say(
            f"attempt {number}: {layout.starter}, {layout.processes} ranks{where}, {start if job.trains else job.stage}"
        )
        self._history.begin(
            AttemptRecord(
                number=number, stage=job.stage, mark=token, argv=command.argv, processes=layout.processes,
                hosts=tuple(host.name for host in standing.hosts), log=str(log.relative_to(job.run_folder)),
                started=time.time(), checkpoint_before=before.checkpoint, reached_before=before.reached,
            )
        )  # fmt: skip
        environment = command.environment(self._environment, token=token)
        local = layout.processes if job.trains and not layout.hosts else 0
        with ExitStack() as stack:
            for path in shown:
                stack.enter_context(LogFollower(path, self._out))
            attempt = Attempt(
                command.argv, environment, token=token, log=log, policy=self._policy, run_folder=job.run_folder,
                local_ranks=local, say=self._say,
                ranks_elsewhere=job.trains and bool(layout.hosts) and layout.starter == "deepspeed",
            )  # fmt: skip
            end = stack.enter_context(attempt).run(stop)
        after = self._progress()
        return Ended(
            self._judge(end), after.checkpoint, after.num_checkpoints, after.reached, asked=bool(stop.received)
        )

    def _command(self, standing: Standing, number: int, *, rank_logs: Path) -> Command:
        job = self._job
        hostfile = None
        if standing.hosts and job.layout.starter == "deepspeed":
            hostfile = job.run_folder / LOGS / f"hosts-{number:04d}"
            write_text(hostfile, render_hostfile(standing.hosts))
        layout = job.layout.on(standing.hosts)
        return self._build(layout, job.arguments, port=job.port or free_port(), hostfile=hostfile, folder=str(Path.cwd()),
                           rank_logs=rank_logs)  # fmt: skip

    def _judge(self, end: AttemptEnd) -> Outcome:
        if end.unkillable:
            # What cannot be killed hangs in a driver or a file system and keeps its GPU and memory.
            shown = ", ".join(map(str, end.unkillable))
            cause = f"processes {shown} survive SIGKILL on {socket.gethostname()}"
            return Outcome(ExitCode.UNHEALTHY_NODE, cause, hosts=(socket.gethostname(),))
        exits = read_exits(self._job.run_folder) if self._job.trains else ()
        return judge(
            exits, launcher_code=end.launcher_code, expected=self._job.trains,
            signals_are_requests=self._job.layout.starter == "srun",
        )  # fmt: skip

    def _settle(self, standing: Standing, ended: Ended, decision: Decision) -> Progress:
        """Say and write down what follows, and move checkpoints as decided."""
        outcome = ended.outcome
        if decision.code is not None:
            text = f"stop with {int(decision.code)} ({decision.code.name.lower()}): {decision.why}"
        else:
            text = (
                f"restart {standing.restarts} of {self._policy.max_restarts} in {decision.wait_s:.1f} s: {decision.why}"
            )
        self._history.close(
            code=None if outcome.code is None else int(outcome.code), cause=outcome.cause, decision=text,
            ranks_at_fault=outcome.ranks, hosts_at_fault=outcome.hosts,
            checkpoint_after=ended.checkpoint, reached_after=ended.reached,
        )  # fmt: skip
        self._say(text)
        if decision.code is ExitCode.NO_PROGRESS:
            self._diagnose()
        if self._aside is not None:
            self._end_step_back(useful=decision.code is ExitCode.COMPLETE or not standing.stepped_back)
        if decision.step_back:
            self._aside = set_newest_aside(self._job.run_folder)
            self._say(f"no progress: trying once from one checkpoint further back; step {self._aside[1]} is kept as "
                      f"{self._aside[0].name}")  # fmt: skip
        return self._progress()

    def _end_step_back(self, *, useful: bool) -> None:
        """After the attempt from further back: give the newest checkpoint its name back, unless doing without it helped."""
        if self._aside is None:
            return
        path, step = self._aside
        self._aside = None
        if useful:
            self._say(f"going on without the checkpoint of step {step}, kept for inspection as {path.name}")
        elif put_back(self._job.run_folder, path, step):
            self._say(f"the checkpoint of step {step} was not the reason and has its name back")

    def _diagnose(self) -> None:
        self._say("the run goes round in circles; the last ends were:")
        for record in self._history.attempts[-_SHOWN_ENDS:]:
            ranks = f", ranks {', '.join(map(str, record.ranks_at_fault))}" if record.ranks_at_fault else ""
            hosts = f" on {', '.join(record.hosts_at_fault)}" if record.hosts_at_fault else ""
            self._say(f"  attempt {record.number}: from step {max(record.checkpoint_before, 0)} to "
                      f"{max(record.reached_after, 0)}{ranks}{hosts}: {record.cause} "
                      f"({self._job.run_folder / record.log})")  # fmt: skip

    def _progress(self) -> Progress:
        return progress_of(self._job.run_folder) if self._job.trains else Progress(-1, 0, -1)
