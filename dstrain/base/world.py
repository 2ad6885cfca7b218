"""Who am I among the ranks: one reading of the environment for deepspeed, torchrun, srun and plain python.

Does not start any process group; `train.engine` does that with the values found here. A World is passed to whoever
needs it: there is no module state.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dstrain.base.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.%]+", re.ASCII)
_LONGEST_HOST = 253
_MOST_HOSTS = 100_000
_LONGEST_LIST = 1 << 20
_COUNTS_RANKS = ("torchrun", "deepspeed", "srun")

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What gloo and NCCL read to choose a network interface."""


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    launcher: str = "python"
    """Which starter was recognised: python, deepspeed, torchrun or srun."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that speaks."""
        return self.rank == 0

    @property
    def is_on_one_host(self) -> bool:
        """Whether all ranks are certainly on this machine, so that nothing of the job needs to listen to the network."""
        if self.local_size != self.size:
            return False
        if self.master_addr in _LOOPBACK:
            return True
        # A launcher that counts the ranks of a node, and a meeting point that is this node under its own name. An address
        # that a person chose stays.
        return self.launcher in _COUNTS_RANKS and self.master_addr in (socket.gethostname(), socket.getfqdn())

    def interface_variables(self) -> dict[str, str]:
        """The loopback interface for ranks that are all on one host; nothing for others."""
        return dict.fromkeys(INTERFACE_VARIABLES, "lo") if self.is_on_one_host else {}

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Write the variables that torch and DeepSpeed read, so that no other discovery (mpi4py) is tried.

        On one host ranks meet and talk over the loopback interface only, unless another one is set.
        """
        for name, value in self.interface_variables().items():
            environment.setdefault(name, value)
        environment.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_SIZE=str(self.local_size),
            MASTER_ADDR="127.0.0.1" if self.is_on_one_host else self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def world_from_environment(environment: Mapping[str, str] | None = None, *, local_rank: int | None = None) -> World:
    """Find rank and world from what the launcher set.

    Args:
        environment: defaults to the process environment.
        local_rank: the `--local_rank` argument that `deepspeed` injects; checked against LOCAL_RANK.

    Raises:
        ConfigError: the variables contradict each other, or one is not a number.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _from_torch(env)
    elif _number(env, "SLURM_NTASKS", default=1) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        world = _from_slurm(env)
    else:
        world = World(master_port=free_port())
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"RANK={world.rank} is outside WORLD_SIZE={world.size}: check the launcher's environment")
    if not _ADDRESS.fullmatch(world.master_addr) or len(world.master_addr) > _LONGEST_HOST:
        raise ConfigError(f"MASTER_ADDR={world.master_addr[:80]!r} is neither a host name nor an address")
    if not 0 < world.master_port < 1 << 16:
        raise ConfigError(f"MASTER_PORT={world.master_port} is no TCP port (1 to 65535)")
    if local_rank is not None and local_rank not in (-1, world.local_rank):
        raise ConfigError(f"--local_rank={local_rank} contradicts LOCAL_RANK={world.local_rank} from the environment")
    return world


def _from_torch(env: Mapping[str, str]) -> World:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    return World(
        rank=rank,
        size=size,
        local_rank=_number(env, "LOCAL_RANK", default=rank),
        local_size=_number(env, "LOCAL_WORLD_SIZE", default=_number(env, "LOCAL_SIZE", default=size)),
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", default=29500),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment",
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    nodes = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost"))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    # One port per job, the same on all ranks without talking: the job id spreads jobs over the dynamic range.
    port = _number(env, "MASTER_PORT", default=20000 + _number(env, "SLURM_JOB_ID", default=0) % 20000)
    return World(
        rank=_number(env, "SLURM_PROCID"),
        size=_number(env, "SLURM_NTASKS"),
        local_rank=_number(env, "SLURM_LOCALID", default=0),
        local_size=_tasks_on_node(tasks, _number(env, "SLURM_NODEID", default=0)),
        master_addr=env.get("MASTER_ADDR", nodes[0]),
        master_port=port,
        launcher="srun",
    )


def _number(env: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    if default is not None and name not in env:
        return default
    text = env[name].strip()
    if not re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII):
        raise ConfigError(f"{name}={env[name][:80]!r} is not a number: check the launcher's environment")
    return int(text)


def _tasks_on_node(text: str, node: int) -> int:
    if node < 0:
        raise ConfigError(f"SLURM_NODEID={node} is negative: check the launcher's environment")
    counts = expand_task_counts(text)
    return counts[min(node, len(counts) - 1)]


def expand_task_counts(text: str) -> list[int]:
    """Read SLURM's `4(x2),2`, tasks on each node, run-length encoded: `[4, 4, 2]`.

    Raises:
        ConfigError: another form, or far too many nodes.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text[:80]!r} is not of the form 4(x2),2")
        counts += [int(match[1])] * int(match[2] or 1)
        if len(counts) > _MOST_HOSTS:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text[:80]!r} names more than {_MOST_HOSTS:,} nodes")
    return counts


def expand_nodelist(text: str) -> list[str]:
    """Expand SLURM's compressed host list: `a[1-3,07]b,c` becomes `[a1b, a2b, a3b, a07b, c]`.

    Raises:
        ConfigError: brackets do not match, a range is not numeric, a name is no host name, or there are far too many.
    """
    if len(text) > _LONGEST_LIST or not re.fullmatch(r"(?:[^,\[\]]|\[[^\[\]]*\]|,)+", text):
        raise ConfigError(f"SLURM node list {text[:80]!r} cannot be read")
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        hosts += _expand_brackets(item, room=_MOST_HOSTS - len(hosts))
    for host in hosts:
        if len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
            raise ConfigError(f"SLURM node list {text[:80]!r}: {host[:80]!r} is no host name")
    if not hosts:
        raise ConfigError(f"SLURM node list {text[:80]!r} cannot be read")
    return hosts


def _expand_brackets(item: str, *, room: int) -> list[str]:
    """All names of one item, from left to right; refuses more than `room` before making them."""
    results = [""]
    for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
        endings = [plain] if plain else _numbers(ranges, room=room)
        if len(results) * len(endings) > room:
            raise ConfigError(f"SLURM node list part {item[:80]!r} names more than {_MOST_HOSTS:,} hosts")
        results = [result + ending for result in results for ending in endings]
    return results


def _numbers(ranges: str, *, room: int) -> list[str]:
    """`1-3,07` as `[1, 2, 3, 07]`, with the zeros that they are written with."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or high < low:
            raise ConfigError(f"SLURM node list part {part[:80]!r} cannot be read")
        if len(numbers) + high - low + 1 > room:
            raise ConfigError(f"SLURM node list part {part[:80]!r} names more than {_MOST_HOSTS:,} hosts")
        numbers += [str(number).zfill(len(match[1])) for number in range(low, high + 1)]
    return numbers


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
