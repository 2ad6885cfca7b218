"""A build of shards that stands still for ever at a chosen moment, to be killed there; started by tests/fault/test_build_kill.py.

    python -m tests.support.stalled_build CORPUS TOKENIZER OUT MOMENT WORKERS SETTINGS READY

MOMENT is a number of finished tasks, or "finish" for the card, the last thing that is written. The file READY says that it is reached.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from dstrain.corpus import build_finish, build_plan
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.executors import Progress


def main(corpus: str, tokenizer: str, out: str, moment: str, workers: str, settings: str, ready: str) -> None:
    """Build until the moment comes."""

    def stall(*_: Any, **__: Any) -> None:
        Path(ready).touch()
        time.sleep(600)

    patched: Any = build_plan
    patched._LEAST_MAP_BYTES = 2048
    if moment == "finish":
        finishing: Any = build_finish
        finishing.write_card = stall
    else:
        stall_after(int(moment), stall)
    config = ShardBuildConfig(workers=int(workers), **json.loads(settings))
    build_shards([corpus + "/*.jsonl"], tokenizer=Path(tokenizer), out=Path(out), config=config, quiet=True)


def stall_after(tasks: int, stall: Any) -> None:
    """Stand still when so many tasks are done."""
    progress: Any = Progress
    count, done = progress.finished, [0]

    def finished(self: Progress, task: Any, result: Any) -> None:
        count(self, task, result)
        done[0] += 1
        if done[0] >= tasks:
            stall()

    progress.finished = finished


if __name__ == "__main__":
    main(*sys.argv[1:])
