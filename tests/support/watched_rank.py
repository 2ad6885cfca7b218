"""A rank without torch: goes through the phases of a run beside its peers and misbehaves as told.

    python watched_rank.py RUN_FOLDER MISCHIEF GUILTY_RANK STEP PHASE WATCHDOG_JSON [WRITE_OWN_EXIT]

The "collective" is a file per rank and step in the run folder: each waits in every step, and at the end of every save, until all
ranks have arrived, in a function whose file name looks like torch's (written by the test), so that stacks look like those of a real run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dstrain.base.storage import write_json
from dstrain.base.world import world_from_environment
from dstrain.health.heartbeat import Phase
from dstrain.health.watchdog import Watchdog, WatchdogConfig

COLLECTIVE = """
import time
def all_reduce(arrived, patience_s):
    started = time.monotonic()
    while not all(p.exists() for p in arrived):
        if time.monotonic() - started > patience_s:
            raise RuntimeError("a peer is gone")
        time.sleep(0.005)
"""


def misbehave(mischief: str) -> None:
    if mischief == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif mischief == "gil":
        while True:
            ctypes.PyDLL(None).sleep(1000)  # C code that keeps the interpreter's lock
    elif mischief == "sleep":
        time.sleep(1000)
    elif mischief == "spin":
        while True:
            pass
    elif mischief == "exit":
        os._exit(3)
    elif mischief == "exception":
        raise RuntimeError("mischief")
    elif mischief == "segv":
        ctypes.string_at(0)
    elif mischief == "abort":
        os.abort()
    elif mischief == "slow":
        time.sleep(2.5)
    else:
        os.kill(os.getpid(), getattr(signal, mischief))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def main() -> None:
    folder, mischief, guilty, at_step, at_phase, settings = sys.argv[1:7]
    world = world_from_environment()
    run_folder = Path(folder)
    source = run_folder / "torch" / "distributed" / "collective.py"
    spec = importlib.util.spec_from_file_location("collective", source)
    collective = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collective)
    options = json.loads(settings)
    patience_s = options.pop("patience_s", 1000)
    config = WatchdogConfig(**options)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with Watchdog(config, world, run_folder) as watchdog:
        pids = {"rank": os.getpid(), "sidecar": watchdog.sidecar_pid, "child": child.pid}
        write_json(run_folder / f"pids-{world.rank}.json", pids)
        # All sidecars are there and know the children before anything happens.
        for rank in range(world.size):
            numbers, watched = run_folder / f"pids-{rank}.json", run_folder / "health" / f"rank-{rank:05d}.json"
            while not numbers.exists() or not watched.exists() or read(numbers)["rank"] != read(watched)["pid"]:
                time.sleep(0.005)

        def enter(phase: Phase, step: int) -> None:
            watchdog.heartbeat.enter(phase, step)
            if (world.rank, step, phase.value) == (int(guilty), int(at_step), at_phase):
                misbehave(mischief)

        def meet(what: str, step: int) -> None:
            (run_folder / f"{what}-{step}-{world.rank}").touch()
            collective.all_reduce([run_folder / f"{what}-{step}-{rank}" for rank in range(world.size)], patience_s)

        for step in range(8):
            enter(Phase.DATA, step)
            enter(Phase.STEP, step)
            meet("arrived", step)
            enter(Phase.SAVE, step + 1)
            meet("saved", step)
        child.kill()
        child.wait()


if __name__ == "__main__":
    main()
