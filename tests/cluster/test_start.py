"""Several hosts before the first step: one that does not see the run folder, one that is out of reach, and what doctor says of them."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.cluster import NODES, Lab, LabError, Started
from tests.support.cluster_runs import ClusterRun
from tests.support.runs import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(600)]

DSTRAIN = (sys.executable, "-m", "dstrain.cli.main")


def test_a_node_that_does_not_see_the_run_folder_is_named_before_the_first_step(
    lab: Lab, tmp_path: Path, shards: Path
) -> None:
    run = ClusterRun.prepare(tmp_path, shards, start={"shared_folder_s": 2.0}, watchdog={"enabled": False})
    run.folder.mkdir()
    lab.on("node2", "mount", "-t", "tmpfs", "none", run.folder)
    try:
        with ExitStack() as stack:
            ranks = [stack.enter_context(rank) for rank in _ranks(lab, run, size=2)]
            assert [rank.wait() for rank in ranks] == [77, 77]
    finally:
        lab.on("node2", "umount", run.folder)
    said = ranks[1].output()
    assert "rank 1 on node2 does not see what rank 0 on node1 writes to run_folder" in said, said
    assert "mount the shared file system on that host" in said
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "start_checks"]
    (finding,) = [finding for finding in event["findings"] if finding["level"] == "failed"]
    assert (finding["check"], finding["hosts"]) == ("shared folder", ["node2"])
    assert run.step == 0, "and no step was taken"
    assert not list(run.folder.glob(".start-check-*"))


def test_a_node_that_is_cut_off_before_the_ranks_meet_is_named_and_not_waited_for(
    lab: Lab, tmp_path: Path, shards: Path
) -> None:
    run = ClusterRun.prepare(tmp_path, shards, start={"join_s": 15.0})
    lab.command("cut", "node2")
    with ExitStack() as stack:
        first, second = [stack.enter_context(rank) for rank in _ranks(lab, run, size=2)]
        assert (first.wait(120), second.wait(120)) == (76, 76)
    assert "rank 1 (on node2) of 2 did not come to node1:29511 within 15 s" in first.output()
    assert "rank 0 did not answer at node1:29511 within 15 s" in second.output()


def test_doctor_names_the_host_that_ssh_does_not_reach_and_finds_two_sound_ones_sound(lab: Lab, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    command = [*DSTRAIN, "doctor", "--hostfile", hostfile, "--folder", tmp_path, "--json"]
    report = json.loads(lab.on("ctl", *command))
    levels = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert report["code"] == 0, report
    for check in ("ssh", "versions", "clock", "shared folder"):
        assert levels[check] in ("ok", "warning"), report
    assert levels["ssh"] == levels["versions"] == levels["shared folder"] == "ok"
    lab.command("cut", "node2")
    with pytest.raises(LabError) as caught:
        lab.on("ctl", *command)
    assert ": 77: " in str(caught.value)
    assert '"hosts": [\n    "node2"\n   ]' in str(caught.value)


def test_doctor_checks_the_nodes_of_an_allocation(lab: Lab, tmp_path: Path) -> None:
    command = [*DSTRAIN, "doctor", "--with", "srun", "--num-processes", "2", "--folder", tmp_path, "--json"]
    said = lab.on("ctl", "salloc", "--nodes=2", "--ntasks-per-node=1", *command)
    report = json.loads(said[said.index("{") :])
    assert report["code"] == 0, report
    assert {"versions", "clock", "shared folder", "network"} <= {finding["check"] for finding in report["findings"]}
    assert "seen by 2 hosts" in next(f["text"] for f in report["findings"] if f["check"] == "shared folder")


def _ranks(lab: Lab, run: ClusterRun, *, size: int) -> list[Started]:
    """One rank a node, as srun starts them: it says where each rank is."""
    environment = {
        "SLURM_NTASKS": str(size), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MASTER_PORT": "29511",
    }  # fmt: skip
    return [
        lab.start(
            node, sys.executable, ROOT / "launch/pretrain.py", "--config", run.config, log=run.config.with_name(f"{node}.log"),
            environment={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank)},
        )
        for rank, node in enumerate(NODES)
    ]  # fmt: skip
