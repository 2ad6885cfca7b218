"""What can be seen to be wrong before anything is started: port, GPUs, batch, file system. Each fault is one line with its mend.

Looks at this machine only; what other machines see is checked by the ranks themselves.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from dstrain.base.errors import ConfigError, MachineError
from dstrain.base.mounts import mount_of

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})


def check_port(port: int, *, listens_here: bool) -> None:
    """Refuse a port that something on this machine listens on, or that is none.

    Args:
        port: `--port`.
        listens_here: whether the first rank is on this machine.

    Raises:
        ConfigError: with the mend.
    """
    if not 1024 <= port < 1 << 16:
        raise ConfigError(f"--port {port}: take one from 1024 to 65535, or leave it out for a free one")
    if not listens_here:
        return
    with socket.socket() as probe:
        # As torch's store does: connections that were closed do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))  # as wide as torch listens where ranks are on several hosts
        except OSError as error:
            raise ConfigError(
                f"--port {port}: cannot be listened on at {socket.gethostname()} ({os.strerror(error.errno or 0)}): "
                "another job may use it; take another, or leave it out for a free one"
            ) from None


def check_gpus(processes: int, *, gpus: int, wants_gpus: bool) -> None:
    """Refuse more ranks on this machine than it has GPUs.

    Args:
        processes: ranks on this machine.
        gpus: that it shows.
        wants_gpus: `engine.device: cuda`, or auto and there are some.

    Raises:
        MachineError: this machine shows no GPU.
        ConfigError: it shows too few, with the number that fits.
    """
    if wants_gpus and gpus == 0:
        raise MachineError(
            "engine.device: cuda is asked for and this machine shows no GPU: start it where there are some, submit it "
            "(--with sbatch), or set engine.device=cpu"
        )
    if wants_gpus and processes > gpus:
        raise ConfigError(f"{processes} ranks on this machine, which shows {gpus} GPUs: give --num-processes {gpus}")


def check_batch(world: int, *, global_batch: int) -> str | None:
    """Refuse more ranks than a step has rows; returns a remark where they get unequal shares, which costs time but no exactness.

    Raises:
        ConfigError: with both ends to change.
    """
    if world > global_batch:
        raise ConfigError(
            f"{world} ranks and train.global_batch={global_batch}: some would have nothing to do; start at most {global_batch} ranks, or "
            f"raise train.global_batch to a multiple of {world}"
        )
    if global_batch % world:
        low = global_batch // world
        near = f"{low * world} or {(low + 1) * world}"
        return f"train.global_batch={global_batch} does not divide by {world} ranks: some wait for others; {near} would"
    return None


def check_shared(folder: Path, *, hosts: int, mounts: str | None = None) -> None:
    """Refuse a run folder in this machine's memory for a job on other machines.

    Whether a disk is shared cannot be told from one side: the ranks compare what they see.

    Args:
        folder: the run folder, which may not exist yet.
        hosts: of the job, this machine counting only when it takes part.
        mounts: text of /proc/self/mountinfo; default: this machine's.

    Raises:
        ConfigError: naming the folder and its file system.
    """
    if hosts < 2:
        return
    mount = mount_of(folder, mounts=mounts)
    if mount.kind in _IN_MEMORY:
        raise ConfigError(
            f"run_folder {folder}: {mount.point} is {mount.kind}, memory of this machine that the other {hosts - 1} do not see: "
            "put it on the file system that all nodes share"
        )


def check_deepspeed_environment(environment: Mapping[str, str], *, folder: Path) -> None:
    """Refuse a `.deepspeed_env` that DeepSpeed's launcher would end on: it takes every line for NAME=value, blank ones too.

    Args:
        environment: says where it is looked for: HOME, and DS_ENV_FILE for another name.
        folder: working folder, where it is looked for as well.

    Raises:
        ConfigError: naming file and line.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for path in dict.fromkeys((Path(environment.get("HOME", "/")) / name, folder / name)):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for number, line in enumerate(lines, start=1):
            if re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line, re.ASCII) is None:
                raise ConfigError(
                    f"{path}, line {number}: {line[:80]!r}: DeepSpeed's launcher takes NAME=value only, no blank lines and no comments"
                )
