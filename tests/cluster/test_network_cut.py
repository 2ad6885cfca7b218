"""The cable of one of two hosts is pulled in the middle of a step: noticed, named, ended on both sides, gone on with."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dstrain.launcher.history import read_history
from tests.support.cluster import NODES, Lab, Started, wait_until
from tests.support.cluster_page import page_command
from tests.support.cluster_runs import MIN_STEP_BUDGET_S, ClusterRun, Result
from tests.support.runs import ROOT
from tests.support.slurm_runs import BIN

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(600)]

REPORT_S, KILL_S = 5.0, 5.0
"""The defaults of `watchdog.report_s` and `watchdog.kill_s`."""
SLACK_S = 5.0
"""For two busy cores, and the launchers' own ways."""


@pytest.mark.parametrize("cut", NODES)
def test_a_pulled_cable_is_named_both_sides_end_in_time_and_the_next_start_goes_on(
    lab: Lab, tmp_path: Path, shards: Path, undisturbed: Result, cut: str
) -> None:
    run = ClusterRun.prepare(tmp_path, shards)
    with ExitStack() as stack:
        agents = [stack.enter_context(agent) for agent in _torchrun(lab, run)]
        wait_until(lambda: run.step >= 60, what="step 60", tell=lambda: agents[0].output() + agents[1].output())
        lab.command("cut", cut)
        cut_at = time.monotonic()
        codes = [agent.wait(MIN_STEP_BUDGET_S + REPORT_S + KILL_S + SLACK_S) for agent in agents]
        took = time.monotonic() - cut_at
    said = "\n".join(agent.output() for agent in agents)
    assert 0 not in codes, said
    assert took > MIN_STEP_BUDGET_S / 2, "it cannot have been the watchdog"

    report = json.loads((run.folder / "health/hang-report.json").read_text())
    suspect = NODES.index(cut)
    assert (report["finding"]["rank"], report["finding"]["host"]) == (suspect, cut), report["line"]
    assert report["finding"]["cause"] == "network", report["line"]
    assert report["line"] in said
    assert [e["code"] for e in run.exits()] == [77 if rank == suspect else 76 for rank in (0, 1)]
    assert {e["cause"] for e in run.exits()} == {report["line"]}
    assert [lab.processes(node, str(run.config)) for node in NODES] == [[], []]
    assert [lab.processes(node, "dstrain.health") for node in NODES] == [[], []]

    lab.command("heal", cut)
    with ExitStack() as stack:
        again = [stack.enter_context(agent) for agent in _torchrun(lab, run)]
        assert [agent.wait() for agent in again] == [0, 0], again[0].output() + again[1].output()
    assert run.result() == undisturbed


def test_a_launcher_over_ssh_does_not_wait_for_the_cut_host_and_starts_again(
    lab: Lab, tmp_path: Path, shards: Path, undisturbed: Result
) -> None:
    run = ClusterRun.prepare(tmp_path, shards)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    command = page_command("dstrain launch pretrain configs/bert-base.yaml --hostfile", {
        "dstrain": BIN / "dstrain", "configs/bert-base.yaml": run.config, "hosts": hostfile,
    })  # fmt: skip
    with lab.start("ctl", *command, log=tmp_path / "launch.log") as launcher:
        wait_until(lambda: run.step >= 60, what="step 60", tell=launcher.output)
        lab.command("cut", "node2")
        wait_until(lambda: len(run.exits()) == 2, what="both sides have ended", tell=launcher.output)
        lab.command("heal", "node2")
        assert launcher.wait() == 0, launcher.output()
    first, second = read_history(run.folder)
    assert (first.code, first.ranks_at_fault, first.hosts_at_fault) == (77, (1,), ("node2",))
    assert second.code == 0
    assert run.result() == undisturbed


def _torchrun(lab: Lab, run: ClusterRun) -> list[Started]:
    """The launcher on each node, as a person would start it there."""
    return [
        lab.start(
            node, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1",
            "--master-addr", NODES[0], "--master-port", "29511", ROOT / "launch/pretrain.py", "--config", run.config,
            log=run.config.with_name(f"{node}.log"),
        )
        for rank, node in enumerate(NODES)
    ]  # fmt: skip
