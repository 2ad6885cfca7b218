"""`slurm/tensorboard.sbatch` under a real SLURM: the line that its log prints, typed elsewhere, leads to the curves."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.support.cluster import Lab, LabError, wait_until
from tests.support.cluster_page import page_command
from tests.support.runs import ROOT
from tests.support.slurm_runs import EXPORT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_the_line_in_the_log_leads_to_the_curves_and_nothing_else_does(lab: Lab, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "runs/one")) as writer:
        writer.add_scalar("train/loss", 1.5, 1)
    log = tmp_path / "job.log"
    command = page_command("sbatch slurm/tensorboard.sbatch", {
        "slurm/tensorboard.sbatch": ROOT / "slurm/tensorboard.sbatch", "runs/": tmp_path / "runs",
    })  # fmt: skip
    job = lab.submit("--nodelist=node2", "--cpus-per-task=1", f"--output={log}", EXPORT, *command[1:])
    line = re.compile(r"^  (ssh -N -L 6006:127\.0\.0\.1:(\d+) -J \S+@ctl \S+@node2)$", re.MULTILINE)
    wait_until(lambda: log.exists() and line.search(log.read_text()) is not None, what="the line", timeout_s=90,
               tell=lambda: f"{lab.job(job)}\n{log.read_text() if log.exists() else ''}")  # fmt: skip
    found = line.search(log.read_text())
    assert found is not None
    with lab.start("ctl", *shlex.split(found[1]), log=tmp_path / "ssh.log") as tunnel:
        wait_until(lambda: _answers(lab, "ctl", "127.0.0.1:6006"), what="an answer", timeout_s=60, tell=tunnel.output)
        assert json.loads(_get(lab, "ctl", "127.0.0.1:6006/data/runs")) == ["one"]
        scalars = _get(lab, "ctl", "127.0.0.1:6006/data/plugin/scalars/scalars?run=one&tag=train/loss")
        assert [point[1:] for point in json.loads(scalars)] == [[1, 1.5]]
    assert _answers(lab, "node2", f"127.0.0.1:{found[2]}")
    assert not _answers(lab, "ctl", f"node2:{found[2]}"), "it listens on loopback only"

    lab.on("ctl", "scancel", job)
    wait_until(lambda: not lab.processes("node2", str(tmp_path / "runs")), what="nothing left", timeout_s=60)


def _get(lab: Lab, host: str, address: str) -> str:
    fetch = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
    return lab.on(host, "python3", "-c", fetch, f"http://{address}")


def _answers(lab: Lab, host: str, address: str) -> bool:
    try:
        _get(lab, host, address)
    except LabError:
        return False
    return True
