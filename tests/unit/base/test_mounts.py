"""The mount that a folder is on, from the kernel's list and on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.mounts import UNKNOWN, Mount, mount_of

NFS, DISK = Mount("nfs4", "server:/home", "/home"), Mount("ext4", "/dev/sda1", "/")
MOUNTS = r"""22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/me/with\040blank rw - tmpfs none rw
32 22 0:42 / /tmp rw - tmpfs first rw
33 32 0:43 / /tmp rw - xfs /dev/sdb1 rw
not a line
"""


@pytest.mark.parametrize(
    ("folder", "mount"),
    [
        ("/home/me/run", NFS),
        ("/homework", DISK),
        ("/home/me/with blank/x", Mount("tmpfs", "none", "/home/me/with blank")),
        ("/tmp/x", Mount("xfs", "/dev/sdb1", "/tmp")),
    ],
)
def test_a_folder_lies_on_the_nearest_and_latest_mount(folder: str, mount: Mount) -> None:
    assert mount_of(Path(folder), mounts=MOUNTS) == mount


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("/home/me")
    assert mount_of(tmp_path / "runs/not-yet", mounts=MOUNTS) == NFS


def test_nothing_known_is_nothing_claimed() -> None:
    assert mount_of(Path("/x"), mounts="") == UNKNOWN


def test_this_machine_has_a_list() -> None:
    assert mount_of(Path("/proc/self")).kind == "proc"
