"""The cable of one of two hosts is pulled in the middle of a step: noticed, named, ended on both sides, gone on with."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.cluster import NODES, Lab, Started, wait_until
from tests.support.cluster_runs import MIN_STEP_BUDGET_S, ClusterRun, Result
from tests.support.runs import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

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
