"""`slurm/pretrain.sbatch` under a real SLURM: whatever ends the job, it goes on by itself and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint.layout import published_steps
from dstrain.launcher.history import read_history
from tests.support.cluster import NODES, Lab, wait_until
from tests.support.cluster_runs import ClusterRun, Result
from tests.support.runs import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent


class SlurmRun:
    """A run that `sbatch` starts."""

    def __init__(self, lab: Lab, home: Path, shards: Path, **sections: Any) -> None:
        self.lab, self.home = lab, home
        self.run = ClusterRun.prepare(home, shards, **sections)
        self.log = home / "job.log"
        self.job = ""

    def submit(self, *options: str, arguments: tuple[str, ...] = ()) -> SlurmRun:
        """Two nodes, one rank each."""
        self.job = self.lab.submit(
            "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10",
            f"--output={self.log}", f"--export=ALL,PATH={BIN}:{os.environ['PATH']}", *options,
            ROOT / "slurm/pretrain.sbatch", self.run.config, *arguments,
        )  # fmt: skip
        return self

    def wait_for_step(self, step: int) -> None:
        """Until the run is well under way."""
        wait_until(lambda: self.run.step >= step, what=f"step {step}", tell=self.tell)

    def wait_for_restart(self, number: int = 1) -> None:
        """Until SLURM has started the job again."""
        wait_until(
            lambda: self.now().restarts >= number and self.now().state == "RUNNING", what="a restart", tell=self.tell
        )

    def now(self) -> Any:
        """What the controller says."""
        return self.lab.job(self.job)

    def finish(self, *, restarts: int) -> Result:
        """Wait for the end, which must be good and not before so many requeues; returns what the run came to."""
        wait_until(lambda: self.now().state not in ("RUNNING", "PENDING", "COMPLETING"), what="the end", tell=self.tell)
        assert (self.now().state, self.now().exit_code) == ("COMPLETED", "0:0"), self.tell()
        # A busy controller repeats a signal that a node was slow to confirm, even to the job's next start: that is one more.
        assert self.now().restarts >= restarts, self.tell()
        return self.run.result()

    def stop_for_good(self) -> None:
        """End an endless run, once it has gone on from its newest checkpoint."""
        saved = max(published_steps(self.run.folder / "checkpoints"))[0]
        self.wait_for_step(saved + 1)
        (self.run.folder / "stop").touch()
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
        return f"{self.now()} at step {self.run.step}\n{log}"


@pytest.fixture
def slurm_run(lab: Lab, tmp_path: Path, shards: Path) -> SlurmRun:
    return SlurmRun(lab, tmp_path, shards)


def test_a_job_runs_to_its_end_with_a_log_for_each_rank_and_another_finds_it_complete(
    slurm_run: SlurmRun, undisturbed: Result
) -> None:
    assert slurm_run.submit().finish(restarts=0) == undisturbed
    logs = slurm_run.run.folder / "logs"
    assert {path.name for path in logs.glob("attempt-0001*")} == {
        "attempt-0001.log", "attempt-0001-rank-00000.log", "attempt-0001-rank-00001.log",
    }  # fmt: skip
    assert "step 300/300" in (logs / "attempt-0001-rank-00000.log").read_text()
    assert "step 300/300" in slurm_run.log.read_text(), "the first rank's log is shown in the job's"
    assert [words["host"] for words in slurm_run.run.exits()] == list(NODES)
    before = slurm_run.log.stat().st_size
    assert slurm_run.submit().finish(restarts=0) == undisturbed
    assert "already complete at step 300" in slurm_run.log.read_text()[before:], "and the log was appended to"


def test_the_end_of_the_time_limit_saves_and_requeues(
    lab: Lab, tmp_path: Path, shards: Path, undisturbed: Result
) -> None:
    run = SlurmRun(lab, tmp_path, shards, stop={"margin_s": 60.0}).submit()
    run.wait_for_step(20)
    lab.on("ctl", "scontrol", "update", f"JobId={run.job}", "EndTime=now+50")
    wait_until(lambda: run.now().state == "PENDING", what="the requeue", tell=run.tell)
    lab.on("ctl", "scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    assert run.finish(restarts=1) == undisturbed
    assert (75, "the end of the SLURM job is near") in run.causes(before_attempt=2)
    assert "stopped and saved: back into the queue" in run.log.read_text()


def test_slurms_own_signal_reaches_the_ranks_and_a_stop_file_ends_the_chain(
    lab: Lab, tmp_path: Path, shards: Path
) -> None:
    run = SlurmRun(lab, tmp_path, shards, train={"max_steps": 100_000}, stop={"slurm_end": False})
    run.submit("--time=1", "--signal=USR1@10")
    run.wait_for_restart()
    assert [code for code, _ in run.causes(before_attempt=2)] == [75, 75]
    assert "SIGUSR1" in {cause for _, cause in run.causes(before_attempt=2)}
    run.stop_for_good()
    _is_sound(run.run)


def test_a_dead_rank_is_started_again_inside_the_allocation_and_a_stop_by_signal_goes_back_into_the_queue(
    lab: Lab, slurm_run: SlurmRun, undisturbed: Result
) -> None:
    slurm_run.submit().wait_for_step(60)
    lab.on("node2", "pkill", "-KILL", "--full", "--newest", f"pretrain --config {slurm_run.run.config}")
    wait_until(lambda: len(read_history(slurm_run.run.folder)) == 2, what="attempt 2", tell=slurm_run.tell)
    assert slurm_run.now().restarts == 0
    reached = slurm_run.run.step
    slurm_run.wait_for_step(reached + 5)
    lab.on("ctl", "scancel", "--signal=TERM", slurm_run.job)
    assert slurm_run.finish(restarts=1) == undisturbed
    assert [code for code, _ in slurm_run.causes(before_attempt=2)] == [76, 76]
    assert [code for code, _ in slurm_run.causes(before_attempt=3)] == [75, 75]


def test_a_preempted_job_saves_in_its_grace_and_goes_on_afterwards(
    lab: Lab, slurm_run: SlurmRun, undisturbed: Result
) -> None:
    slurm_run.submit("--partition=low").wait_for_step(20)
    urgent = lab.submit(
        "--partition=high", "--nodes=2", "--gpus-per-node=1", f"--output={slurm_run.home / 'urgent'}", "--wrap=true"
    )
    assert lab.wait_for_job(urgent).state == "COMPLETED"
    assert slurm_run.finish(restarts=1) == undisturbed
    assert "SIGTERM" in {cause for _, cause in slurm_run.causes(before_attempt=2)}
    assert [code for code, _ in slurm_run.causes(before_attempt=2)] == [75, 75]


def test_a_node_whose_slurmd_dies_is_given_up_and_the_job_goes_on_when_it_is_back(
    lab: Lab, tmp_path: Path, shards: Path
) -> None:
    run = SlurmRun(lab, tmp_path, shards, train={"max_steps": 100_000}).submit()
    run.wait_for_step(60)
    lab.command("kill-slurmd", "node2")
    wait_until(lambda: run.now().state != "RUNNING", what="the node given up", tell=run.tell)
    wait_until(lambda: not lab.processes("node2", str(run.run.config)), what="no orphan", tell=run.tell)
    lab.command("start-slurmd", "node2")
    run.wait_for_restart()
    run.stop_for_good()
    _is_sound(run.run)


def test_a_power_cut_of_the_first_node_costs_the_steps_since_the_last_save_only(
    lab: Lab, slurm_run: SlurmRun, undisturbed: Result
) -> None:
    slurm_run.submit().wait_for_step(60)
    lab.command("crash", "node1")
    wait_until(lambda: slurm_run.now().state != "RUNNING", what="the node given up", tell=slurm_run.tell)
    wait_until(lambda: not lab.processes("node2", str(slurm_run.run.config)), what="no orphan", tell=slurm_run.tell)
    lab.command("up")
    assert slurm_run.finish(restarts=1) == undisturbed


def test_a_node_that_is_at_fault_is_not_given_the_job_again(lab: Lab, slurm_run: SlurmRun) -> None:
    slurm_run.submit(arguments=("--max-restarts", "0")).wait_for_step(20)
    lab.on("node2", "pkill", "-STOP", "--full", "--newest", f"pretrain --config {slurm_run.run.config}")
    wait_until(lambda: slurm_run.now().state == "PENDING", what="the requeue", tell=slurm_run.tell)
    wait_until(lambda: "ExcNodeList=node2" in lab.on("ctl", "scontrol", "show", "job", slurm_run.job), what="node2 excluded",
               timeout_s=20, tell=slurm_run.tell)  # fmt: skip
    assert "without node2" in slurm_run.log.read_text()


def test_shards_built_by_an_array_are_those_of_one_machine(lab: Lab, tmp_path: Path, shards: Path) -> None:
    home = shards.parent
    array = lab.submit(
        "--array=0-2", "--cpus-per-task=1", "--mem-per-cpu=0", "--time=5", f"--output={tmp_path}/%a.log",
        f"--export=ALL,PATH={BIN}:{os.environ['PATH']}", ROOT / "slurm/build_shards.sbatch",
        "--input", home / "corpus.jsonl", "--tokenizer", home / "tok", "--out", tmp_path / "shards",
        "--block-tokens", "1024", "--validation-fraction", "0.1",
    )  # fmt: skip
    wait_until(lambda: lab.on("ctl", "squeue", "--noheader", f"--jobs={array}") == "", what="the array's end",
               tell=lambda: "".join(path.read_text() for path in tmp_path.glob("*.log")))  # fmt: skip
    assert _tars(tmp_path / "shards") == _tars(shards)


def _is_sound(run: ClusterRun) -> None:
    """Every row of every step exactly once, proved from what the run has left."""
    command = [BIN / "dstrain", "audit", run.folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _tars(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}
    assert found
    return found
