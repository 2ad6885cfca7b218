"""The text of `dstrain launch --dry-run`: what would be started, with which environment, and what each rank makes of its machine. Pure.

Lines without `#` can be pasted into a shell. Values of forwarded variables are not shown: some are credentials.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from dstrain.base.rank_settings import RankSettings
from dstrain.base.world import World
from dstrain.launcher.choice import Choice
from dstrain.launcher.forwarding import forwarded
from dstrain.launcher.node_view import NodeView
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.rank_environment import CACHES, THREAD_VARIABLES, describe, rank_environment
from dstrain.launcher.starters import Command

_OVER_PDSH = "MLFLOW* PYTHON* MV2* UCX* NCCL*"


def command_text(choice: Choice, command: Command) -> list[str]:
    """The way, and the command with the variables it adds and takes away."""
    lines = [f"# {choice.way}: {choice.why}"]
    if command.removed:
        lines.append(f"unset {' '.join(command.removed)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(command.added.items())]
    return [*lines, shlex.join(command.argv)]


def forwarding_text(environment: Mapping[str, str], more: Sequence[str], command: Command) -> list[str]:
    """Names of the variables that the job inherits, and of those it does not."""
    kept = forwarded(environment, more)
    names = sorted(set(kept) - set(command.removed) - set(command.added))
    left = sorted(set(environment) - set(kept))
    lines = [f"# environment forwarded: {' '.join(names) or 'nothing'}"]
    if "pdsh" in command.argv:
        lines.append(f"# of it, pdsh takes to other hosts only {_OVER_PDSH} and what .deepspeed_env names")
    return [*lines, f"# left out (--forward NAME adds one): {' '.join(left)}"] if left else lines


def ranks_here_text(
    settings: RankSettings, *, launcher: str, processes: int, node: NodeView, environment: Mapping[str, str]
) -> list[str]:
    """What each rank on this machine will set for itself.

    Args:
        settings: of the run.
        launcher: that starts them.
        processes: ranks.
        node: this machine.
        environment: that they inherit.

    Raises:
        ConfigError: this machine lacks the interface that the settings name.
    """
    lines = ["# each rank sets for itself, before torch is imported:"]
    variables: Mapping[str, str] = {}
    for rank in range(processes):
        world = World(rank=rank, size=processes, local_rank=rank, local_size=processes, launcher=launcher)
        found = rank_environment(settings, world, node, environment)
        variables = variables or {
            name: value if name in found.forced else environment.get(name, value)
            for name, value in found.variables.items()
        }
        lines.append(f"#   rank {rank}: {describe(found)}")
    lines += [f"#   {name}={shlex.quote(value)}" for name, value in variables.items() if name not in THREAD_VARIABLES]
    return [*lines, f"#   collectives wait at most {settings.timeout_s} s (engine.timeout_s)"]


def ranks_elsewhere_text(settings: RankSettings) -> list[str]:
    """By which rules ranks on other machines will set themselves up; what comes out depends on those."""
    cache = settings.compile_cache or "a folder of this user, Python and torch in the node's TMPDIR"
    interface = (
        settings.interface
        or "loopback on one node; else the one that leads to the first rank for gloo, NCCL's own choice for NCCL"
    )
    return [
        "# each rank sets for itself on its node, before torch is imported:",
        f"#   {', '.join(THREAD_VARIABLES)}: {settings.threads or 'the physical cores of its share of the node'}",
        f"#   cores: engine.bind={settings.bind}",
        f"#   interface: {interface}",
        f"#   {', '.join(CACHES)}: in {cache}",
        f"#   collectives wait at most {settings.timeout_s} s (engine.timeout_s)",
    ]


def policy_text(policy: RestartPolicy) -> list[str]:
    """When it is started again."""
    return [f"# restarts: at most {policy.max_restarts}; given up after {policy.idle_limit} ends without progress"]


def script_text(path: str, text: str) -> list[str]:
    """The batch script, as it would be submitted."""
    return [f"# ---- {path}", *text.rstrip("\n").split("\n")]


def joined(*parts: Iterable[str]) -> str:
    """All lines as one text."""
    return "".join(f"{line}\n" for part in parts for line in part)
