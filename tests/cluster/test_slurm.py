"""`slurm/pretrain.sbatch` under a real SLURM: whatever ends the job, it goes on by itself and ends as if nothing had happened."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from dstrain.launcher.history import read_history
from tests.support.cluster import NODES, SPARE, Lab, wait_until
from tests.support.cluster_page import page_line
from tests.support.cluster_runs import ClusterRun, Result
from tests.support.runs import ROOT
from tests.support.slurm_runs import BIN, SlurmRun

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(600)]


@pytest.fixture
def slurm_run(lab: Lab, tmp_path: Path, shards: Path) -> SlurmRun:
    return SlurmRun(lab, tmp_path, shards)


def test_a_job_runs_to_its_end_with_a_log_for_each_rank_and_another_finds_it_complete(
    lab: Lab, tmp_path: Path, shards: Path, undisturbed: Result
) -> None:
    slurm_run = SlurmRun(lab, tmp_path, shards, checkpoint={"every_steps": 100_000}).submit()
    slurm_run.wait_for_step(1)
    assert slurm_run.job in _looked_at(slurm_run, "squeue --me")
    _looked_at(slurm_run, "touch RUN/save")
    assert slurm_run.finish(restarts=0) == undisturbed
    saved = [int(name.removeprefix("step-")) for name in _looked_at(slurm_run, "ls RUN/checkpoints/").split()]
    assert len(saved) == 2, "the one that was asked for, and the last"
    assert min(saved) < max(saved) == 300
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
    run.submit("--signal=USR1@30").wait_for_step(20)
    lab.on("ctl", "scontrol", "update", f"JobId={run.job}", "EndTime=now+60")
    wait_until(lambda: run.now().state == "PENDING", what="the requeue", tell=run.tell)
    lab.on("ctl", "scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
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
    slurm_run.save_and_requeue()
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


def test_a_node_that_is_at_fault_is_left_out_and_the_job_goes_on_with_one_of_another_gpu_type(
    lab: Lab, slurm_run: SlurmRun, undisturbed: Result
) -> None:
    slurm_run.submit("--partition=all", arguments=("--max-restarts", "0")).wait_for_step(20)
    assert slurm_run.now().nodes == "node[1-2]"
    lab.on("node2", "pkill", "-STOP", "--full", "--newest", f"pretrain --config {slurm_run.run.config}")
    wait_until(lambda: slurm_run.now().restarts == 1, what="the requeue", tell=slurm_run.tell)
    assert slurm_run.finish(restarts=1) == undisturbed
    assert "without node2" in slurm_run.log.read_text()
    assert slurm_run.now().nodes == f"node1,{SPARE}" or slurm_run.now().nodes == "node[1,3]"
    assert [words["host"] for words in slurm_run.run.exits()] == [NODES[0], SPARE]
    assert "ExcNodeList=node2" in lab.on("ctl", "scontrol", "show", "job", slurm_run.job)
    history, exits = _looked_at(slurm_run, "cat RUN/supervisor.json"), _looked_at(slurm_run, "ls RUN/logs/")
    assert '"node2"' in history
    assert "attempt-0002-rank-00001.log" in exits
    assert json.loads(_looked_at(slurm_run, "cat RUN/health/hang-report.json"))["finding"]["host"] == "node2"
    types = lab.on("ctl", "sinfo", "--noheader", "--partition=all", "--Node", "--format=%N %G").splitlines()
    assert sorted(types) == ["node1 gpu:a:1", "node2 gpu:a:1", f"{SPARE} gpu:b:1"]


def test_a_cable_that_is_cut_inside_a_job_ends_both_sides_and_the_job_goes_on_without_that_node(
    lab: Lab, slurm_run: SlurmRun, undisturbed: Result
) -> None:
    slurm_run.submit("--partition=all").wait_for_step(60)
    lab.command("cut", "node2")
    wait_until(lambda: not lab.processes("node2", str(slurm_run.run.config)), what="no orphan", tell=slurm_run.tell)
    assert slurm_run.finish(restarts=1) == undisturbed, "and all the while the cable was cut"
    assert [words["host"] for words in slurm_run.run.exits()] == [NODES[0], SPARE]


def test_a_chain_goes_on_where_the_job_before_ran_out_of_time_and_the_rest_find_it_complete(
    lab: Lab, tmp_path: Path, shards: Path, undisturbed: Result
) -> None:
    run = SlurmRun(lab, tmp_path, shards, stop={"margin_s": 60.0})
    *loop, command = page_line("for n in 1 2 3 4").removesuffix("; done").partition("; do ")
    assert loop == ["for n in 1 2 3 4", "; do "]
    words = [
        {
            "slurm/pretrain.sbatch": str(ROOT / "slurm/pretrain.sbatch"),
            "configs/bert-base.yaml": str(run.run.config),
        }.get(w, w)
        for w in shlex.split(command)
    ]
    first, second, *rest = [run.queue(words, "--nodes=2", "--time=10") for _ in range(4)]
    run.job = first
    run.wait_for_step(20)
    assert [lab.job(job).state for job in (second, *rest)] == ["PENDING"] * 3
    lab.on("ctl", "scontrol", "update", f"JobId={first}", "EndTime=now+50")
    ended = lab.wait_for_job(first)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "75:0", 0), run.tell()
    for job in (second, *rest):
        run.job = job
        assert run.finish(restarts=0) == undisturbed
    assert run.log.read_text().count("already complete at step 300") == len(rest)


def _looked_at(run: SlurmRun, start: str) -> str:
    """What a line of the page prints on the login node, with this run's folder and job."""
    words = [word.replace("RUN", str(run.run.folder)).replace("JOB", run.job) for word in shlex.split(page_line(start))]
    return run.lab.on("ctl", *words)


def _is_sound(run: ClusterRun) -> None:
    """Every row of every step exactly once, proved from what the run has left."""
    command = [BIN / "dstrain", "audit", run.folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
