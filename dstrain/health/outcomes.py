"""How a rank ended, in a small file: launchers and schedulers lose exit codes, the run folder does not."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from dstrain.base.errors import DstrainError, ExitCode
from dstrain.base.storage import make_directory, write_json
from dstrain.base.world import World


def write_exit(run_folder: Path, world: World, *, code: ExitCode, cause: str, step: int | None) -> None:
    """Leave `exit/rank-00000.json`; best effort, because it is written when things may be broken already."""
    try:
        folder = run_folder / "exit"
        make_directory(folder)
        write_json(
            folder / f"rank-{world.rank:05d}.json",
            {
                "code": int(code),
                "name": code.name.lower(),
                "cause": cause,
                "step": step,
                "rank": world.rank,
                "world_size": world.size,
                "host": socket.gethostname(),
                "time": time.time(),
            },
        )
    except DstrainError:
        pass
