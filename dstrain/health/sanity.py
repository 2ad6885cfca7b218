"""The checks of all ranks together, one after the other: what `stages` runs before the first step and `dstrain doctor` on demand.

Collects and gathers; every rank comes to the same findings, because all judge what was gathered. Raises nothing about what it
finds: that is `sanity_findings.refuse`'s.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dstrain.base.control import ControlPlane
from dstrain.health.sanity_clock import judge_clocks, offsets, read_clocks
from dstrain.health.sanity_disk import SCRATCH_BYTES, Room, judge_room, judge_scratch, room_at
from dstrain.health.sanity_findings import Finding
from dstrain.health.sanity_folder import judge_folder, look_at_folder
from dstrain.health.sanity_gpu import (
    Product,
    ask_nvidia_smi,
    judge_host,
    judge_products,
    multiply,
    parse_xids,
    read_kernel_log,
)
from dstrain.health.sanity_links import Link, expectation, own_link, slower
from dstrain.health.sanity_machine import accelerator_here
from dstrain.health.sanity_network import facts, judge_all_reduce, judge_pairs, time_all_reduce, time_pairs
from dstrain.health.start_config import StartConfig


@dataclass(frozen=True)
class Places:
    """Where a run will write."""

    run_folder: Path
    needed_bytes: int
    """Of one checkpoint; 0 when it is not known."""
    keep: int = 2
    """Checkpoints kept."""
    mirror: Path | None = None
    """A second place on a disk."""
    cache: Path | None = None
    """A folder of each host's own for downloaded data."""
    cache_bytes: int = 0


@dataclass
class Inspection:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers for tools."""


def inspect(
    control: ControlPlane, device: str, config: StartConfig, places: Places, *, may_use_gpus: bool = False
) -> Inspection:
    """Collective. Make every check that is switched on; those between ranks only where there are several.

    Args:
        control: agreements between ranks.
        device: cpu or cuda.
        config: which checks.
        places: where the run will write.
        may_use_gpus: whether a CPU was taken only because there seemed to be no GPU.

    Raises:
        StorageError: rank 0 cannot write to the run folder (PeerError on the others).
    """
    done = Inspection()
    hosts = control.gather_json(socket.gethostname())
    several = control.world.size > 1
    if config.clock and len(set(hosts)) > 1:
        found = offsets(read_clocks(control))
        done.findings.append(judge_clocks(found, hosts, warn_s=config.clock_warn_s, limit_s=config.clock_limit_s))
        done.facts["clock_offsets_s"] = [round(offset.middle, 4) for offset in found]
    if config.shared_folder and several:
        looks = look_at_folder(control, places.run_folder, patience_s=config.shared_folder_s)
        done.findings.append(judge_folder(looks, hosts, folder=places.run_folder))
    if config.disk:
        done.findings += _disk(control, places, hosts)
    if config.network and several:
        _network(control, device, config, hosts, done)
    if config.gpu and device == "cpu" and may_use_gpus:
        done.findings += _unused(control, hosts)
    if config.gpu and device == "cuda":
        done.findings += _gpu(control, config, hosts)
    return done


def _disk(control: ControlPlane, places: Places, hosts: list[str]) -> list[Finding]:
    """Collective. Rank 0's places, and what each host has for itself."""
    shared = {"run_folder": places.run_folder, "checkpoint.mirror": places.mirror}
    found = {key: room_at(path) for key, path in shared.items() if path is not None} if control.world.is_first else {}
    rooms = {key: _room(room) for key, room in control.from_first({k: _plain(r) for k, r in found.items()}).items()}
    findings = judge_room(rooms, needed_bytes=places.needed_bytes, keep=places.keep)
    for name, path, needed in (
        ("the temporary folder", Path(tempfile.gettempdir()), SCRATCH_BYTES),
        ("storage.cache_dir", places.cache, places.cache_bytes),
    ):
        if path is not None:
            own = _plain(room_at(path)) if control.world.local_rank == 0 else None
            of_each = [_room(one) for one in control.gather_json(own)]
            findings += judge_scratch(of_each, hosts, name=name, needed_bytes=needed)
    return findings


def _network(control: ControlPlane, device: str, config: StartConfig, hosts: list[str], done: Inspection) -> None:
    """Collective."""
    found = time_all_reduce(control, device)
    pairs = time_pairs(control, hosts)
    links = [Link(**link) for link in control.gather_json(asdict(own_link()))]
    slowest = links[0]
    for link in links[1:]:
        slowest = slower(slowest, link)
    expected = expectation(
        slowest, backend="nccl" if device == "cuda" else "gloo", on_one_host=len(set(hosts)) == 1,
        gpu=str(control.from_first(torch.cuda.get_device_name() if device == "cuda" else "")),
    )  # fmt: skip
    done.findings.append(judge_all_reduce(found, expected, share=config.network_share))
    slow = judge_pairs(pairs, hosts)
    done.findings += [] if slow is None else [slow]
    done.facts["network"] = dict(facts(found, pairs))


def _unused(control: ControlPlane, hosts: list[str]) -> list[Finding]:
    """Collective. Hosts with a driver that torch cannot use, where the run would be slow in silence."""
    own = accelerator_here()
    told = own.to_json() if control.world.local_rank == 0 and own.level == "failed" else None
    return [
        replace(Finding.from_json(one), level="warning", text=f"{hosts[rank]}: {one['text']}; the run uses the CPU",
                ranks=(rank,), hosts=(hosts[rank],))
        for rank, one in enumerate(control.gather_json(told)) if one is not None
    ]  # fmt: skip


def _gpu(control: ControlPlane, config: StartConfig, hosts: list[str]) -> list[Finding]:
    """Collective. Each rank's GPU multiplies; the first rank of each host asks the driver about all of its job's GPUs there."""
    own = multiply("cuda")
    mine = {"host": hosts[control.world.rank], "uuid": _own_uuid(), "pid": os.getpid(), "product": asdict(own)}
    everybody = control.gather_json(mine)
    here = [one for one in everybody if one["host"] == mine["host"]]
    told = [finding.to_json() for finding in _ask(control, here)] if control.world.local_rank == 0 else []
    products = [Product(**one["product"]) for one in everybody]
    findings = judge_products(products, hosts, share=config.gpu_share)
    return [*findings, *(Finding.from_json(one) for found in control.gather_json(told) for one in found)]


def _ask(control: ControlPlane, here: list[Mapping[str, Any]]) -> list[Finding]:
    rank, host = control.world.rank, str(here[0]["host"])
    answers = ask_nvidia_smi()
    if isinstance(answers, str):
        return [Finding("gpu", "skipped", f"{host}: {answers}", ranks=(rank,), hosts=(host,))]
    uuids = {str(one["uuid"]) for one in here}
    states = [state for state in answers[0] if state.uuid in uuids]
    # Inside a container the driver may tell numbers of outside, which say nothing here.
    processes = {
        uuid: [text for text in found if Path(f"/proc/{text.split()[0]}").exists()]
        for uuid, found in answers[1].items()
    }
    log = read_kernel_log()
    findings = judge_host(
        states, processes, None if log is None else parse_xids(log), rank=rank, host=host,
        own=[int(one["pid"]) for one in here],
    )  # fmt: skip
    if log is None:
        findings.append(Finding("gpu", "skipped", f"{host}: XID messages cannot be read (the kernel's log is root's)"))
    return findings


def _own_uuid() -> str:
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _plain(room: Room | None) -> dict[str, Any] | None:
    return None if room is None else asdict(room)


def _room(data: dict[str, Any] | None) -> Room | None:
    return None if data is None else Room(**data)
