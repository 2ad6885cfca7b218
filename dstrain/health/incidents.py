"""What the watchdogs of a run tell each other: small files in the run folder, because a hung network tells nobody anything.

    health/rank-00003.json              where each rank is, renewed every few seconds by its watchdog
    health/incident-0001-alarm.json     somebody hangs or has died: created once, by whoever sees it first
    health/incident-0001-report.json    what was found out, created once; health/hang-report.json is a copy of the newest
    health/stacks/0001-rank-00003.txt   the rank's Python stacks

Numbers go on across restarts, so nothing is removed and an old alarm cannot be taken for a new one; a job's name keeps a
second job that was started on the same folder by mistake apart. Alarms lie beside the files that every watchdog renews,
because over NFS a change of one's own makes the client look at the folder again. Decides nothing. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError
from dstrain.base.storage import create_exclusively, make_directory, read_json, write_json
from dstrain.base.world import World

_LIMIT_BYTES = 4 << 20
_ALARM = re.compile(r"incident-(\d{4,})-alarm\.json")
_JOB_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "DSTRAIN_ATTEMPT",
)  # fmt: skip


def job_name(world: World, environment: Mapping[str, str]) -> str:
    """A name that all ranks of one start of a job work out alike, and no other job that runs at the same time.

    Args:
        world: any rank's.
        environment: of the process; what schedulers and launchers set the same on every rank.
    """
    host = socket.gethostname() if world.local_size >= world.size else ""  # 127.0.0.1 exists on every host
    parts = [host, world.master_addr, str(world.master_port), str(world.size)]
    parts += [environment.get(name, "") for name in _JOB_VARIABLES]
    return f"{zlib.crc32(json.dumps(parts).encode()):08x}"


class HealthFolder:
    """`health/` of a run folder, as one job uses it."""

    def __init__(self, run_folder: Path, *, job: str, first: int | None = None) -> None:
        """Open the folder; it is made when it is missing.

        Args:
            run_folder: of the run.
            job: from `job_name`.
            first: number of the first incident that can concern this job; None takes the next free one.

        Raises:
            StorageError: it cannot be written.
        """
        self.folder = run_folder / "health"
        self.job = job
        make_directory(self.folder / "stacks")
        self.first = first if first is not None else 1 + max(self._numbers(), default=0)

    def stacks_path(self, rank: int) -> Path:
        """Where a rank's stacks go."""
        return self.folder / "stacks" / f"{self.first:04d}-rank-{rank:05d}.txt"

    def publish(self, rank: int, facts: Mapping[str, Any]) -> None:
        """Renew a rank's file.

        Raises:
            StorageError: it cannot be written.
        """
        write_json(self.folder / f"rank-{rank:05d}.json", {**facts, "rank": rank, "job": self.job})

    def facts(self, rank: int) -> dict[str, Any] | None:
        """What a rank's watchdog said last, or None when this job's has said nothing."""
        found = _read(self.folder / f"rank-{rank:05d}.json")
        return found if found is not None and found.get("job") == self.job else None

    def raise_alarm(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Raise the alarm, or find out that somebody was faster.

        Returns:
            The alarm in force, with its `number`.

        Raises:
            StorageError: it cannot be written.
        """
        number = self.first
        while True:
            alarm = self.alarm()
            if alarm is not None:
                return alarm
            content = json.dumps({**data, "job": self.job, "number": number}, indent=1, sort_keys=True) + "\n"
            create_exclusively(self.folder / f"incident-{number:04d}-alarm.json", content.encode())
            number += 1

    def alarm(self) -> dict[str, Any] | None:
        """The first alarm of this job, or None."""
        for number in sorted(self._numbers()):
            if number >= self.first:
                found = _read(self.folder / f"incident-{number:04d}-alarm.json")
                if found is not None and found.get("job") == self.job:
                    return {**found, "number": number}
        return None

    def publish_report(self, number: int, report: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Publish what was found out about an incident, unless somebody has done so.

        Returns:
            The report in force, and whether it is this one.

        Raises:
            StorageError: it cannot be written.
        """
        path = self.folder / f"incident-{number:04d}-report.json"
        content = json.dumps(report, indent=1, sort_keys=True) + "\n"
        mine = create_exclusively(path, content.encode())
        if mine:
            write_json(self.folder / "hang-report.json", report)
        return (dict(report) if mine else _read(path) or dict(report)), mine

    def report(self, number: int) -> dict[str, Any] | None:
        """The report on an incident, or None."""
        return _read(self.folder / f"incident-{number:04d}-report.json")

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return [int(match[1]) for match in map(_ALARM.fullmatch, names) if match is not None]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path, limit_bytes=_LIMIT_BYTES)
    except DataError:
        return None
    return found if isinstance(found, dict) else None
