"""`dstrain doctor`: the checks before the first step on demand, and those of each machine by itself. Trains nothing, leaves nothing.

One process looks at its own machine; several, started as a training would be, compare machines and time their network. Every
finding says what to do. What a run's data and model need is seen by the run itself.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dstrain.base.control import ControlPlane
from dstrain.base.errors import DstrainError, ExitCode, MachineError
from dstrain.base.peer_loss import peer_loss_named
from dstrain.base.world import World
from dstrain.health.consistency import check_agreement
from dstrain.health.sanity import Places, inspect
from dstrain.health.sanity_findings import Finding
from dstrain.health.sanity_machine import look_at_machine
from dstrain.health.start_config import StartConfig
from dstrain.stages.assembly import AnyConfig, open_site
from dstrain.stages.cross_checks import installation
from dstrain.stages.sanity import places_of
from dstrain.train.ds_config import EngineConfig
from dstrain.train.op_cache import STALE_AFTER_S, unheld_locks

_TIMEOUT_S = 60


def examine(config: AnyConfig | None, world: World, *, folder: Path) -> list[Finding]:
    """Collective. What is found, the same on every rank.

    Args:
        config: of a run, whose device, places and limits are used; None for what holds without one.
        world: this process's place; alone, only this machine is looked at.
        folder: where a file is shared when there is no run folder.

    Raises:
        DstrainError: ranks are missing, or this one cannot take part.
    """
    engine = config.engine if config is not None else EngineConfig(timeout_s=_TIMEOUT_S)
    start = config.start if config is not None else StartConfig(join_s=60.0)
    places = places_of(config, num_parameters=0) if config is not None else Places(folder, 0)
    locks = [str(path) for path, age_s in unheld_locks() if age_s >= STALE_AFTER_S]
    with ExitStack() as stack:
        stack.enter_context(peer_loss_named(lambda: "while the machines were checked"))
        site = stack.enter_context(open_site(engine, start, world))
        found = of_machines(site.control, look_at_machine(locks) if world.local_rank == 0 else [])
        if world.size > 1:
            found.append(_alike(site.control))
        found += inspect(site.control, site.device, start, places).findings
        site.control.barrier()  # nobody leaves while another still asks
        return found


def of_machines(control: ControlPlane, own: list[Finding]) -> list[Finding]:
    """Collective. Every machine's own findings in one list: what is well of the first one only, what is not with its host."""
    gathered = control.gather_json([[finding.to_json() for finding in own], _host()])
    findings = []
    for rank, (told, host) in enumerate(gathered):
        for finding in map(Finding.from_json, told):
            if finding.level in ("warning", "failed"):
                text = finding.text if control.world.size == 1 else f"{host}: {finding.text}"
                findings.append(replace(finding, text=text, ranks=(rank,), hosts=(host,)))
            elif rank == 0:
                findings.append(finding)
    return findings


def as_finding(error: DstrainError) -> Finding:
    """A fault that ended the checks, as their last line."""
    code = int(error.exit_code)
    return Finding(
        "start", "failed", str(error), code=code if code != ExitCode.DEFECT else int(ExitCode.UNHEALTHY_NODE)
    )


def _alike(control: ControlPlane) -> Finding:
    """Collective. Whether all machines have the same code and libraries."""
    try:
        check_agreement(control, installation())
    except MachineError as error:
        text, _, fix = str(error).rpartition(": ")
        return Finding("versions", "failed", text, fix)
    return Finding("versions", "ok", "the same code and libraries everywhere")


def _host() -> str:
    return socket.gethostname()
