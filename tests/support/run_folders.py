"""Run folders made up in milliseconds, by the same code that writes them in a run; for tests of what reads them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dstrain.base.storage import write_json
from dstrain.base.world import World
from dstrain.monitor.events import EventLog


def begin(run: Path, *, steps: int = 6, loss: float = 5.0, **config: Any) -> Path:
    """A run that has done some steps of 100, one a second."""
    run.mkdir(parents=True)
    plain = {"model": {"config": {"model_type": "bert"}}, "train": {"max_steps": 100}, **config}
    (run / "config.yaml").write_text(json.dumps(plain))
    log = EventLog(run / "events.jsonl", World())
    log.write("started", step=0, max_steps=100)
    log.write("evaluated", step=0, metrics={"loss": 6.0, "seconds": 1.0})
    for step in range(1, steps + 1):
        log.write(
            "step",
            step=step,
            loss=loss,
            accuracy=0.25,
            tokens=1_000 * step,
            tokens_per_second=2_000.0,
            padding_percent=1.5,
            mfu=0.42,
        )
    log.close()
    lines = (run / "events.jsonl").read_text().splitlines()
    now = time.time()
    timed = [{**json.loads(line), "time": now - len(lines) + number} for number, line in enumerate(lines, 1)]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, timed)) + "\n")
    return run


def beat(
    run: Path,
    rank: int,
    *,
    phase: str = "step",
    seconds: float = 0.1,
    age_s: float = 0.0,
    allowance: float | None = 30.0,
) -> None:
    """As the watchdog beside a rank writes it."""
    said = {
        "rank": rank, "host": f"n{rank // 2}", "phase": phase, "step": 6, "time_in_phase_s": seconds, "allowance_s": allowance,
        "time": time.time() - age_s,
    }  # fmt: skip
    (run / "health").mkdir(exist_ok=True)
    write_json(run / "health" / f"rank-{rank:05d}.json", said)
