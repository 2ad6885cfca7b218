"""A run that `sbatch` starts on the virtual cluster, and what is asked of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dstrain.checkpoint.layout import published_steps
from tests.support.cluster import Job, Lab, wait_until
from tests.support.cluster_page import page_command
from tests.support.cluster_runs import ClusterRun, Result
from tests.support.runs import ROOT

BIN = Path(sys.executable).parent
EXPORT = f"--export=ALL,PATH={BIN}:{os.environ['PATH']}"
"""For sbatch: what the scripts say a person should put there, a line that gets dstrain onto the path."""
ONE_RANK_A_NODE = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class SlurmRun:
    """A pretraining run on two nodes, one rank each."""

    def __init__(self, lab: Lab, home: Path, shards: Path, **sections: Any) -> None:
        self.lab, self.home, self.shards = lab, home, shards
        self.run = ClusterRun.prepare(home, shards, **sections)
        self.log = home / "job.log"
        self.job = ""

    def submit(self, *options: str, arguments: tuple[str, ...] = ()) -> SlurmRun:
        """With the page's own command."""
        command = page_command("sbatch --nodes=4", {
            "--nodes=4": "--nodes=2", "--time=12:00:00": "--time=10", "configs/bert-base.yaml": self.run.config,
            "slurm/pretrain.sbatch": ROOT / "slurm/pretrain.sbatch", "data.path=shards/": f"data.path={self.shards}",
        })  # fmt: skip
        self.job = self.queue(command, *options, arguments=arguments)
        return self

    def queue(self, command: list[str], *options: str, arguments: tuple[str, ...] = ()) -> str:
        """`sbatch` with what the lab needs and further options; returns the job's number."""
        program, *words = command
        assert program == "sbatch"
        script = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
        ours = (*ONE_RANK_A_NODE, f"--output={self.log}", EXPORT, *options)
        return self.lab.submit(*words[:script], *ours, *words[script:], *arguments)

    def wait_for_step(self, step: int) -> None:
        """Until the run is well under way."""
        wait_until(lambda: self.run.step >= step, what=f"step {step}", tell=self.tell)

    def wait_for_restart(self, number: int = 1) -> None:
        """Until SLURM has started the job again."""
        wait_until(
            lambda: self.now().restarts >= number and self.now().state == "RUNNING", what="a restart", tell=self.tell
        )

    def now(self) -> Job:
        """What the controller says."""
        return self.lab.job(self.job)

    def finish(self, *, restarts: int) -> Result:
        """Wait for the end, which must be good and not before so many requeues; returns what the run came to."""
        wait_until(lambda: self.now().state in ENDED, what="the end", tell=self.tell)
        assert (self.now().state, self.now().exit_code) == ("COMPLETED", "0:0"), self.tell()
        # A busy controller repeats a signal that a node was slow to confirm, even to the job's next start: that is one more.
        assert self.now().restarts >= restarts, self.tell()
        return self.run.result()

    def save_and_requeue(self) -> None:
        """As a person would ask for it."""
        self.lab.on("ctl", *page_command("scancel --signal=TERM", {"JOB": self.job}))

    def stop_for_good(self) -> None:
        """End an endless run, once it has gone on from its newest checkpoint."""
        saved = max(published_steps(self.run.folder / "checkpoints"))[0]
        self.wait_for_step(saved + 1)
        self.lab.on("ctl", *page_command("touch RUN/stop", {"RUN/stop": self.run.folder / "stop"}))
        assert self.lab.wait_for_job(self.job).exit_code == "82:0", self.tell()
        assert self.run.step == max(published_steps(self.run.folder / "checkpoints"))[0]

    def causes(self, *, before_attempt: int) -> list[tuple[int, str]]:
        """Code and cause that each rank of an earlier attempt left."""
        folder = self.run.folder / f"logs/exit-before-attempt-{before_attempt:04d}"
        wait_until(folder.exists, what=f"attempt {before_attempt}", tell=self.tell)
        left = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
        return [(words["code"], words["cause"]) for words in left]

    def tell(self) -> str:
        """For a failure."""
        log = self.log.read_text(errors="replace")[-5000:] if self.log.exists() else ""
        return f"{self.now() if self.job else 'not submitted'} at step {self.run.step}\n{log}"
