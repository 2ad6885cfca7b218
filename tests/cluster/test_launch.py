"""`dstrain launch` on a login node with a real sbatch: submitted, run to the end, chained, and refused in SLURM's own words."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Lab, LabError, wait_until
from tests.support.cluster_page import page_command
from tests.support.cluster_runs import ClusterRun, Result

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

DSTRAIN = Path(sys.executable).parent / "dstrain"
SMALL = ("--ntasks-per-node", "1", "--cpus-per-task", "1", "--time", "10")


def launch(lab: Lab, home: Path, *words: object) -> str:
    """Submit from the login node, in a folder that then holds the job's log; returns its number."""
    return lab.on("ctl", "env", "-C", home, DSTRAIN, "launch", *words).splitlines()[-1]


def end_of(lab: Lab, job: str, home: Path) -> tuple[str, str, str]:
    """State, exit code and log of a job, once it has ended."""
    ended = lab.wait_for_job(job)
    return ended.state, ended.exit_code, "".join(path.read_text() for path in home.glob(f"*-{job}.log"))


def test_a_run_is_submitted_and_its_chain_ends_with_0_when_it_is_complete(
    lab: Lab, tmp_path: Path, shards: Path, undisturbed: Result
) -> None:
    run = ClusterRun.prepare(tmp_path, shards)
    page = page_command(
        "dstrain launch pretrain configs/bert-base.yaml --nodes",
        {"configs/bert-base.yaml": run.config, "4": 2, "8": 1, "12:00:00": 10},
    )
    words = (*page[2:], "--cpus-per-task", "1", "--job-name", "bert-1", "--singleton")
    first, second = launch(lab, tmp_path, *words), launch(lab, tmp_path, *words)
    assert "singleton" in lab.on("ctl", "squeue", "--noheader", f"--jobs={second}", "--format=%E")
    state, code, log = end_of(lab, first, tmp_path)
    assert (state, code) == ("COMPLETED", "0:0"), log
    assert run.result() == undisturbed
    assert [words["host"] for words in run.exits()] == ["node1", "node2"]
    state, code, log = end_of(lab, second, tmp_path)
    assert (state, code) == ("COMPLETED", "0:0"), log
    assert "already complete" in log


def test_ranks_of_one_node_that_srun_starts_keep_to_cores_of_their_own(lab: Lab, tmp_path: Path, shards: Path) -> None:
    run = ClusterRun.prepare(tmp_path, shards, train={"max_steps": 100_000}, engine={"threads": None, "bind": "cores"})
    job = launch(
        lab, tmp_path, "pretrain", run.config, "--nodes", "1", "--ntasks-per-node", "2", "--cpus-per-task", "1"
    )
    wait_until(lambda: run.step >= 3, what="a few steps")
    wait_until(lambda: len(cores_kept(lab, run)) == 2, what="two ranks and their watchers on two sets of cores")
    (run.folder / "stop").touch()
    _, code, log = end_of(lab, job, tmp_path)
    assert code == "82:0", log


def cores_kept(lab: Lab, run: ClusterRun) -> set[str]:
    """The sets of cores that processes of a run keep to on the first node."""
    mine = f" {sys.executable} -u -m dstrain.cli.main pretrain --config {run.config}"
    found: set[str] = set()
    for line in lab.on("node1", "ps", "-ww", "-eo", "pid=,args=").splitlines():
        if mine in line.split("srun")[0]:
            with contextlib.suppress(LabError):  # a process that has ended since
                found.add(lab.on("node1", "taskset", "--cpu-list", "--pid", line.split()[0]).split(": ")[1])
    return found


def test_shards_are_submitted_as_an_array(lab: Lab, tmp_path: Path, shards_by_default: Path) -> None:
    home = shards_by_default.parent
    array = launch(
        lab, tmp_path, "shards", "--input", home / "corpus.jsonl", "--tokenizer", home / "tok", "--out", tmp_path / "out",
        "--array", "0-2", "--time", "5",
    )  # fmt: skip
    wait_until(lambda: lab.on("ctl", "squeue", "--noheader", f"--jobs={array}") == "", what="the array's end")
    tars = {
        folder: {p.name: p.read_bytes() for p in folder.rglob("*.tar")}
        for folder in (tmp_path / "out", shards_by_default)
    }
    assert tars[tmp_path / "out"] == tars[shards_by_default] != {}


def test_what_sbatch_refuses_is_told_in_one_line(lab: Lab, tmp_path: Path, shards: Path) -> None:
    run = ClusterRun.prepare(tmp_path, shards)
    with pytest.raises(LabError, match=r"sbatch refused the job: .*partition"):
        launch(lab, tmp_path, "pretrain", run.config, "--nodes", "2", *SMALL, "--partition", "nowhere")
