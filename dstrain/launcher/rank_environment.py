"""The environment of a rank, decided in one place: threads, cores, interface, GPU visibility, caches. A pure function, and its use.

Every rank calls `take_up` at its start, before torch is imported, whoever started it (`dstrain launch`, deepspeed, torchrun, srun, python).
`dstrain launch --dry-run` prints what the same function gives. The launcher passes nothing on but the configuration's `engine` section, so
there is no second truth in variables that one launcher forwards and another drops.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dstrain.base.errors import ConfigError
from dstrain.base.logs import get_logger
from dstrain.base.rank_settings import RankSettings
from dstrain.base.world import INTERFACE_VARIABLES, World
from dstrain.launcher.node_view import Cpu, NodeView, cores_of, look_at_node

_LOG = get_logger(__name__)

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CACHES = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
"""Variables that say where compiled things go, and the folders they get."""

NODE_CPUS = "DSTRAIN_NODE_CPUS"
"""What was allowed before the rank bound itself: a second run in this process must not take a share of a share."""
OWN_THREADS = "DSTRAIN_OWN_THREADS"
"""OMP_NUM_THREADS as a rank wrote it, to tell it from a person's word."""
MARKS = (NODE_CPUS, OWN_THREADS)


@dataclass(frozen=True)
class RankEnvironment:
    """What one rank takes up."""

    threads: int
    cpus: tuple[int, ...] | None
    """Hardware threads it keeps to; None leaves them as they are."""
    how: str
    """Why these cores, for people."""
    variables: Mapping[str, str]
    """Set where nobody has set them before, but for those of `forced`."""
    forced: frozenset[str] = frozenset()
    """Variables that are set whatever was there: the configuration's word, and threads."""


def rank_environment(
    settings: RankSettings, world: World, node: NodeView, environment: Mapping[str, str], *, route: str | None = None
) -> RankEnvironment:
    """The environment of one rank. Pure.

    Args:
        settings: the `engine` section.
        world: the rank's place.
        node: its machine.
        environment: that it was started with.
        route: interface that leads to the first rank, where that is known.

    Raises:
        ConfigError: the interface that the configuration names does not exist here.
    """
    cpus, how = _cores(settings, world, node, environment)
    threads = settings.threads or _threads(world, node, environment, cpus)
    variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
    variables |= _interfaces(settings, world, node, route)
    cache = settings.compile_cache or node.scratch
    variables |= {name: str(cache / folder) for name, folder in CACHES.items()}
    forced = set(THREAD_VARIABLES)
    forced |= set(INTERFACE_VARIABLES) if settings.interface else set()
    forced |= set(CACHES) if settings.compile_cache else set()
    return RankEnvironment(threads, cpus, how, variables, frozenset(forced))


def describe(found: RankEnvironment) -> str:
    """One line for people."""
    shown = f"cores {ranges(found.cpus)} ({found.how})" if found.cpus else f"cores as started ({found.how})"
    interface = found.variables.get("GLOO_SOCKET_IFNAME", "chosen by gloo")
    return f"{found.threads} threads, {shown}, interface {interface}"


def ranges(numbers: tuple[int, ...]) -> str:
    """`0-3,8` for people and for taskset."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def check_interface(name: str, known: tuple[str, ...]) -> None:
    """Refuse an interface that this machine lacks; NCCL would wait for it, gloo end with an unclear word.

    Raises:
        ConfigError: with those that exist.
    """
    if name not in known:
        raise ConfigError(
            f"engine.interface: {name!r} does not exist on {socket.gethostname()}: it has {', '.join(known) or 'none'}; "
            "name one of these, or leave it out"
        )


def take_up(settings: RankSettings, world: World, environment: MutableMapping[str, str]) -> RankEnvironment:
    """Make this process the rank that `rank_environment` describes; calling it again changes nothing.

    Call it before torch is imported where that is possible: its thread pool and its interfaces are chosen then.

    Raises:
        ConfigError: see `rank_environment`.
    """
    allowed = os.sched_getaffinity(0)
    before = _numbers(environment.get(NODE_CPUS, ""))
    node = look_at_node(environment, allowed=before if before > allowed else allowed)
    found = rank_environment(settings, world, node, environment, route=route_to(world))
    if found.cpus is not None:
        _bind(found.cpus)
        environment[NODE_CPUS] = ranges(tuple(cpu.number for cpu in node.cpus))
    said = environment.get("OMP_NUM_THREADS")
    for name, value in found.variables.items():
        if name in found.forced:
            environment[name] = value
        elif name not in CACHES or name in environment or _is_private(node.scratch, value):
            environment.setdefault(name, value)
    if said != environment["OMP_NUM_THREADS"]:
        environment[OWN_THREADS] = environment["OMP_NUM_THREADS"]
    return found


def route_to(world: World) -> str | None:
    """The interface whose address this machine uses towards the first rank; None on one host, or where no name leads there.

    Where a host's name means 127.0.1.1, as Debian sets it, gloo by itself would listen where no other machine reaches it.
    """
    if world.is_on_one_host:
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            world.master_addr, world.master_port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: asks the routing table, sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(found.address.split("%")[0] == own for found in addresses):
            return name
    return None


def _cores(
    settings: RankSettings, world: World, node: NodeView, environment: Mapping[str, str]
) -> tuple[tuple[int, ...] | None, str]:
    if settings.bind == "none":
        return None, "engine.bind: none"
    if _is_bound(world, node, environment):
        return None, "bound by the launcher"
    several = len({cpu.node for cpu in node.cpus}) > 1
    if settings.bind == "auto":
        owned = _owned(environment)
        if world.local_size > 1 and owned is not None and node.cores <= owned:
            kind = "cores"
        elif several and len(set(node.gpu_nodes)) > 1:
            kind = "numa"
        else:
            return None, "not bound: others may use this machine too" if world.local_size > 1 else "not bound"
    else:
        kind = settings.bind
    share = _share(world, node)
    if not share:
        return None, f"not bound: {node.cores} cores for {world.local_size} ranks"
    if kind == "numa":
        nodes = {cpu.node for cpu in share}
        share = [cpu for cpu in node.cpus if cpu.node in nodes]
        return tuple(sorted(cpu.number for cpu in share)), f"NUMA {ranges(tuple(nodes))}"
    return tuple(sorted(cpu.number for cpu in share)), "its own"


def _share(world: World, node: NodeView) -> list[Cpu]:
    """Whole cores of one rank: beside its GPU where that is known, equal shares of each NUMA node; none where there are too few."""
    nodes = node.gpu_nodes
    known = len(nodes) >= world.local_size and set(nodes) <= {cpu.node for cpu in node.cpus}
    mates = [rank for rank in range(world.local_size) if not known or nodes[rank] == nodes[world.local_rank]]
    cores = [core for core in cores_of(node.cpus) if not known or core[0].node == nodes[world.local_rank]]
    place, count = mates.index(world.local_rank), len(mates)
    chosen = cores[place * len(cores) // count : (place + 1) * len(cores) // count]
    return [cpu for core in chosen for cpu in core]


def _is_bound(world: World, node: NodeView, environment: Mapping[str, str]) -> bool:
    """Whether what this process may use is already the share of one rank."""
    if world.local_size == 1:
        return False
    if world.launcher == "srun":
        masks = environment.get("SLURM_CPU_BIND_LIST", "").split(",")
        owned = _owned(environment)
        by_count = owned is not None and len(node.cpus) * world.local_size <= owned
        return by_count or (len(masks) == world.local_size and len(set(masks)) == len(masks))
    # deepspeed --bind_cores_to_rank sets this to the cores of one rank, and nothing without it.
    return world.launcher == "deepspeed" and environment.get("OMP_NUM_THREADS") == str(node.cores) and (
        environment.get(OWN_THREADS) is None
    )  # fmt: skip


def _owned(environment: Mapping[str, str]) -> int | None:
    """CPUs of this node that belong to the SLURM job; None outside of one."""
    text = environment.get("SLURM_CPUS_ON_NODE", "") if environment.get("SLURM_JOB_ID") else ""
    return int(text) if re.fullmatch(r"[1-9]\d{0,5}", text) else None


def _threads(world: World, node: NodeView, environment: Mapping[str, str], cpus: tuple[int, ...] | None) -> int:
    """One for each physical core of the rank; a person's OMP_NUM_THREADS counts, a launcher's does not."""
    said = environment.get("OMP_NUM_THREADS", "")
    by_launcher = world.launcher in ("torchrun", "deepspeed") or said == environment.get(OWN_THREADS)
    if re.fullmatch(r"[1-9]\d{0,4}", said) and not by_launcher:
        return int(said)
    if _is_bound(world, node, environment):
        return max(1, node.cores)
    share = node.cores // world.local_size
    owned = _owned(environment)
    if owned is not None:  # without cgroups a process may see the cores of other jobs
        share = min(share, owned // world.local_size)
    if cpus is not None:
        share = min(share, len(cores_of(cpu for cpu in node.cpus if cpu.number in set(cpus))))
    return max(1, share)


def _interfaces(settings: RankSettings, world: World, node: NodeView, route: str | None) -> dict[str, str]:
    if settings.interface is not None:
        check_interface(settings.interface, node.interfaces)
        return dict.fromkeys(INTERFACE_VARIABLES, settings.interface)
    if loopback := world.interface_variables():
        return loopback
    return {"GLOO_SOCKET_IFNAME": route} if route else {}


def _bind(cpus: tuple[int, ...]) -> None:
    """Keep to these, with every thread there is already (numpy's, the one that watches the parent)."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cpus)
        except ProcessLookupError:
            continue  # it has just ended


def _is_private(scratch: Path, value: str) -> bool:
    """Whether a cache below the scratch folder is ours alone; made if it is missing.

    The folder that all users can write to may hold a folder of that name which somebody else has made, to have us run their code.
    """
    if not Path(value).is_relative_to(scratch):
        return True
    for folder in (scratch.parent, scratch):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            _LOG.warning(
                "%s: cannot be used for compiled ops (%s); libraries use their own place", folder, error.strerror
            )
            return False
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            _LOG.warning("%s: not a folder of this user alone; libraries use their own place for compiled ops", folder)
            return False
    return True


def _numbers(text: str) -> set[int]:
    """The opposite of `ranges`."""
    found: set[int] = set()
    for part in text.split(",") if text else []:
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found
