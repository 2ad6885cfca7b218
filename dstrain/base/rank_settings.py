"""How a rank sits on its machine: threads, cores, network interface, patience, cache; part of the `engine` section.

Apart from the engine's other settings, so that a rank can take them up before it imports torch (launcher/rank_environment.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dstrain.base.config import Config

Bind = Literal["auto", "cores", "numa", "none"]
_LONGEST_INTERFACE = 15  # IFNAMSIZ of Linux, without its closing zero


class RankSettings(Config):
    """What a rank takes of its machine."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each rank. Default: the physical cores this node gives to the job, shared out among its ranks."""
    bind: Bind = "auto"
    """Which cores a rank keeps to. cores: a share of its own; numa: all cores beside its GPU, or its share's NUMA nodes; none: the
    launcher's choice. auto: cores in a SLURM job, whose cores nobody else uses; numa where GPUs sit at several NUMA nodes;
    else none. Cores that SLURM or `deepspeed --bind_cores_to_rank` gave to one rank are left as they are."""
    interface: str | None = None
    """Network interface of NCCL and gloo, such as ib0 or eth0. Default: loopback on one machine; on several, gloo takes the one that
    leads to the first rank, and NCCL chooses for itself."""
    timeout_s: int = Field(default=600, ge=10)
    """Seconds a collective may wait for a peer before the job fails."""
    compile_cache: Path | None = None
    """Folder for ops and kernels that libraries compile. Default: a private one for each user, Python and torch in TMPDIR, which is
    local to the node: on a shared file system builds of different nodes wait for each other's locks."""

    @field_validator("interface")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not is_interface_name(name):
            raise ValueError(
                f"{name!r} is no interface name: letters, digits and .:_- , at most {_LONGEST_INTERFACE}, one name"
            )
        return name


def is_interface_name(name: str) -> bool:
    """Whether a text can name a network interface, and nothing else to NCCL (which reads `^`, `=` and `,` as operators)."""
    plain = name.replace(".", "").replace(":", "").replace("_", "").replace("-", "")
    return plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= _LONGEST_INTERFACE
