"""The cluster itself: hosts of their own, ssh, pdsh, SLURM, cables and power, and nothing left when it is taken down."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import NODES, Lab, LabError, wait_until

pytestmark = pytest.mark.cluster


def test_hosts_have_names_of_their_own_and_reach_each_other_by_ssh_pdsh_and_srun(lab: Lab) -> None:
    assert [lab.on(node, "hostname") for node in NODES] == list(NODES)
    assert lab.on("node1", "ssh", "node2", "hostname") == "node2"
    assert sorted(lab.on("ctl", "pdsh", "-w", "node[1-2]", "hostname").splitlines()) == ["node1: node1", "node2: node2"]
    assert sorted(lab.on("ctl", "srun", "--nodes=2", "--ntasks-per-node=1", "hostname").splitlines()) == list(NODES)
    assert socket.gethostname() not in NODES


def test_a_cut_cable_and_a_power_cut_are_mended(lab: Lab) -> None:
    ping = ["timeout", "2", "bash", "-c", "echo > /dev/tcp/node2/22"]
    lab.on("node1", *ping)
    lab.command("cut", "node2")
    assert lab.on("node2", "hostname") == "node2", "the host lives on"
    with pytest.raises(LabError):
        lab.on("node1", *ping)
    lab.command("crash", "node2")
    with pytest.raises(LabError, match="node2 is off"):
        lab.on("node2", "hostname")
    lab.mend()
    lab.on("node1", *ping)
    assert lab.on("ctl", "srun", "--nodelist=node2", "hostname") == "node2"


@pytest.mark.usefixtures("lab")
def test_nothing_is_left_of_a_cluster_that_was_taken_down(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "other")
    lab.command("up", "1")
    script = str(lab.folder)
    running = [int((lab.folder / "run" / name).read_text().split()[0]) for name in ("switch", "ctl", "node1")]
    assert all(Path(f"/proc/{pid}").exists() for pid in running)
    lab.take_down()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running), what="no process", timeout_s=10)
    assert script not in subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert not lab.folder.exists()
