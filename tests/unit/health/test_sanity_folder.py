"""Who shares the run folder: judged from looks, and with real ranks of which one has another folder under the same name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.base.mounts import Mount
from dstrain.health.sanity_folder import Look, judge_folder

NFS, DISK = Mount("nfs4", "server:/home", "/home"), Mount("ext4", "/dev/sda1", "/")
HERE = Path("/home/me/run")


def test_all_who_see_it_are_counted_by_host():
    looks = [Look(True, 0, NFS), None, Look(True, 2.0, NFS), None]
    finding = judge_folder(looks, ["a", "a", "b", "b"], folder=HERE)
    assert (finding.level, finding.text) == ("ok", "seen by 2 hosts, after 2.0 s")


def test_a_host_without_the_mount_is_at_fault_itself():
    looks = [Look(True, 0, NFS), Look(False, 10.0, DISK), Look(True, 0, NFS)]
    finding = judge_folder(looks, ["a", "b", "c"], folder=HERE)
    assert (finding.level, finding.code, finding.ranks, finding.hosts) == ("failed", 77, (1,), ("b",))
    assert "rank 1 on b does not see what rank 0 on a writes to run_folder /home/me/run" in finding.text
    assert "ext4 from /dev/sda1" in finding.text


def test_a_folder_on_every_hosts_own_disk_is_the_configurations_fault():
    finding = judge_folder([Look(True, 0, DISK), Look(False, 10.0, DISK)], ["a", "b"], folder=Path("/scratch/run"))
    assert (finding.level, finding.code) == ("failed", 78)
    assert "set run_folder to a folder on a file system that all hosts share" in finding.fix


def test_a_host_that_sees_it_and_cannot_write_is_told_so():
    looks = [Look(True, 0, NFS), Look(True, 0, NFS, "Read-only file system")]
    finding = judge_folder(looks, ["a", "b"], folder=HERE)
    assert (finding.level, finding.ranks) == ("failed", (1,))
    assert "cannot write to run_folder /home/me/run (Read-only file system)" in finding.text


RANK = """
import json, os, sys
from pathlib import Path
from torch import distributed
from dstrain.base.control import ControlPlane
from dstrain.base.world import World
from dstrain.health.sanity_folder import judge_folder, look_at_folder
rank, folder, place = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=3)
control = ControlPlane(World(rank=rank, size=3, local_size=1), timeout_s=60)
looks = look_at_folder(control, place, patience_s=0.5)
(folder / f"{rank}.json").write_text(json.dumps(judge_folder(looks, ["a", "b", "c"], folder=Path("/run")).to_json()))
control.barrier()
os._exit(0)
"""


def three_ranks(home, places):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(home), str(place)], env=environment)
        for rank, place in enumerate(places)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    (finding,) = {Path(home / f"{rank}.json").read_text() for rank in range(3)}
    return json.loads(finding)


@pytest.mark.dist
@pytest.mark.parametrize("blind", [None, 1, 2])
def test_a_rank_that_has_another_folder_is_named_and_nothing_is_left(tmp_path, blind):
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    finding = three_ranks(tmp_path, [other if rank == blind else shared for rank in range(3)])
    if blind is None:
        assert (finding["level"], finding["text"]) == ("ok", "seen by 3 hosts")
    else:
        assert finding["level"] == "failed"
        assert f"rank {blind} on {'abc'[blind]} " in finding["text"]
    assert list(shared.iterdir()) == []
    assert list(other.iterdir()) == []
