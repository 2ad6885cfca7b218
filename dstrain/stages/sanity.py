"""The checks before the first step of a run: made by all ranks, written as one event, said in one line; a failed one ends the run.

What is checked is `health.sanity`; here is only what a run's configuration says about it.
"""

from __future__ import annotations

import time
from pathlib import Path

from dstrain.base.locations import RemoteUrl, parse_location
from dstrain.base.logs import get_logger
from dstrain.checkpoint.config import CheckpointConfig
from dstrain.health.sanity import Inspection, Places, inspect
from dstrain.health.sanity_disk import bytes_of_a_save
from dstrain.health.sanity_findings import refuse, summary, worst
from dstrain.monitor.events import EventLog
from dstrain.stages.assembly import AnyConfig, Site
from dstrain.stages.config import PretrainConfig
from dstrain.stages.record import EVENTS

_LOG = get_logger(__name__)


def check_start(config: AnyConfig, site: Site, *, num_parameters: int) -> None:
    """Collective. Refuse to begin on machines that cannot do the work; every rank leaves with the same code.

    Args:
        config: of the run.
        site: ranks and device.
        num_parameters: of the model, for the size of a checkpoint.

    Raises:
        MachineError: on the first rank of each host at fault (77).
        ConfigError, StorageError: the run folder is not shared (78), or there is no room (76).
        PeerError: on all other ranks.
    """
    started = time.perf_counter()
    found = inspect(
        site.control, site.device, config.start, places_of(config, num_parameters=num_parameters),
        may_use_gpus=config.engine.device == "auto",
    )  # fmt: skip
    tell(found, config, site, seconds=time.perf_counter() - started)
    refuse(found.findings, rank=site.world.rank)


def places_of(config: AnyConfig, *, num_parameters: int) -> Places:
    """Where a run will write, and how much.

    Args:
        config: of the run.
        num_parameters: of its model; 0 when that is not known.
    """
    storage = config.data.storage if isinstance(config, PretrainConfig) else None
    return Places(
        config.run_folder,
        bytes_of_a_save(num_parameters) if num_parameters else 0,
        keep=config.checkpoint.keep_last,
        mirror=_mirror_on_a_disk(config.checkpoint),
        cache=storage.cache_dir if storage is not None else None,
        cache_bytes=storage.prefetch_bytes if storage is not None else 0,
    )


def tell(found: Inspection, config: AnyConfig, site: Site, *, seconds: float) -> None:
    """Rank 0. One event, one line, and a line for each warning."""
    if not site.world.is_first:
        return
    log = EventLog(config.run_folder / EVENTS, site.world)
    log.write(
        "start_checks", result=worst(found.findings), seconds=round(seconds, 3),
        findings=[finding.to_json() for finding in found.findings], **found.facts,
    )  # fmt: skip
    log.close()
    if not found.findings:
        return
    _LOG.info("checked before the first step in %.1f s: %s", seconds, summary(found.findings))
    for finding in found.findings:
        if finding.level == "warning":
            _LOG.warning("%s", finding.line())


def _mirror_on_a_disk(config: CheckpointConfig) -> Path | None:
    place = None if config.mirror is None else parse_location(config.mirror)
    return None if isinstance(place, RemoteUrl) else place
