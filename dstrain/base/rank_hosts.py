"""On which host a rank should be, before it has said a word: what the launcher's environment tells, and what others said.

Only for messages about ranks that did not come: where the launcher does not say, or what ranks said contradicts it,
nothing is claimed. Asks only the resolver of this host.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from dstrain.base.errors import ConfigError
from dstrain.base.world import World, expand_nodelist, expand_task_counts

_SHOWN = 8


def expected_hosts(world: World, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Host of rank 0, 1, ... as SLURM laid them out; empty where nobody says.

    Args:
        world: its size and launcher.
        environment: the process's.
    """
    if world.launcher != "srun" or not environment.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        return ()
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    try:
        hosts = [host for host, count in zip(expand_nodelist(nodes), expand_task_counts(tasks)) for _ in range(count)]
    except ConfigError:
        return ()
    return tuple(hosts) if len(hosts) == world.size else ()


def own_address(world: World, environment: Mapping[str, str]) -> str:
    """The address that gloo would tell the other ranks: what this host's name means on it.

    Returns:
        Empty where that does not matter: on one host, or with a network interface chosen by the user.
    """
    if world.is_on_one_host or environment.get("GLOO_SOCKET_IFNAME"):
        return ""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def same_host(left: str, right: str) -> bool:
    """Whether two names mean one machine: `node1` and `node1.cluster` do, two different full names do not."""
    return left == right or left.startswith(right + ".") or right.startswith(left + ".")


def describe_missing(
    missing: Sequence[int], *, heard: Mapping[int, str], expected: Sequence[str], local_size: int
) -> str:
    """Name ranks that did not come, with their hosts as far as that is known.

    Args:
        missing: ranks, ascending, at least one.
        heard: rank → host of those that came.
        expected: of `expected_hosts`; believed only while it agrees with what was heard.
        local_size: ranks of each host, where nothing better is known.

    Returns:
        Such as `rank 3 (on node2)`, or `ranks 4, 5, 6, 7 (on the launcher's host number 2)`.
    """
    shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    who = f"{'rank' if len(missing) == 1 else 'ranks'} {shown}"
    if expected and all(same_host(expected[rank], host) for rank, host in heard.items()):
        hosts = list(dict.fromkeys(expected[rank] for rank in missing))
        return f"{who} (on {', '.join(hosts[:_SHOWN])}{', ...' if len(hosts) > _SHOWN else ''})"
    size = len(heard) + len(missing)
    if not 1 <= local_size < size or size % local_size:
        return who
    numbers = list(dict.fromkeys(rank // local_size for rank in missing))
    seen = {rank // local_size: host for rank, host in heard.items()}
    places = [seen.get(number, f"the launcher's host number {number + 1}") for number in numbers]
    return f"{who} (on {', '.join(places[:_SHOWN])}{', ...' if len(places) > _SHOWN else ''})"
