"""How long a kill costs: from SIGKILL of every rank to the next step that no rank had done before, on the demo's model and data.

    python benchmarks/restart.py [--kills 5] [--processes 2]

The ranks are forked from a process that has done the imports (tests/support/zygote.py), because those depend on the machine's
disk and are the same for everybody; the time they take is measured and shown by itself. What remains is dstrain's: noticing
the dead owner of the run folder, reading and verifying the newest checkpoint, building DeepSpeed's engine, filling it, finding
the place in the data, and doing the steps again that were not saved. The result goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests.support lies beside this folder

from header import ROOT, Facts

from dstrain.checkpoint.layout import published_steps
from tests.support.runs import AUSTEN, Job, wait_for, write_config
from tests.support.zygote import Zygote

HERE = Path(__file__).resolve().parent
TARGET_S = 10.0
EVERY = 10


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    options = parser.parse_args()
    facts = Facts.now(__file__, packages=("dstrain", "torch", "deepspeed", "transformers"))
    with tempfile.TemporaryDirectory(prefix="dstrain-restart-") as scratch:
        config = prepare(Path(scratch))
        with Zygote(Path(scratch) / "zygote.log") as zygote:
            found = list(kills(zygote, config, Path(scratch) / "run", options))
        imports_s = imports()
    text = report(facts, found, imports_s, options.processes)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{facts.date}-restart.md").write_text(text)
    return 0


def prepare(folder: Path) -> Path:
    """The demo's tokenizer, shards and configuration."""
    shards = [
        "shards",
        "build",
        "--validation-fraction",
        "0.05",
        "--block-tokens",
        "16384",
        "--tokenizer",
        str(folder / "tokenizer"),
    ]
    for command in (
        [
            "tokenizer",
            "train",
            "--kind",
            "wordpiece",
            "--lowercase",
            "--model-max-length",
            "128",
            "--vocab-size",
            "8192",
        ],
        shards,
    ):
        out = str(folder / command[0])
        subprocess.run(
            [sys.executable, "-m", "dstrain.cli.main", *command, "--input", str(AUSTEN), "--out", out],
            check=True, cwd=ROOT, capture_output=True,
        )  # fmt: skip
    return write_config(
        folder / "run.yaml",
        {
            "include": [str(ROOT / "dstrain" / "corpora" / "configs" / "pretrain.yaml")],
            "run_folder": str(folder / "run"), "data": {"path": str(folder / "shards")},
            "checkpoint": {"every_steps": EVERY}, "monitor": {"log_every": 1, "tensorboard": False},
        },
    )  # fmt: skip


def kills(zygote: Zygote, config: Path, run: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Kill all ranks some steps behind a checkpoint, start again, wait for a step that is new."""
    job = zygote.start_ranks(config, world_size=options.processes)
    try:
        for number in range(options.kills):
            wait_for(lambda: _newest(run) > 0 and _steps(run)[0] % EVERY == EVERY // 2, job=job, timeout_s=300)
            job.signal(signal.SIGKILL)
            killed_at = time.time()
            job.wait(30)
            reached, saved = _steps(run)[0], _newest(run)
            job = zygote.start_ranks(config, world_size=options.processes)
            wait_for(lambda: _steps(run)[0] > reached, job=job, timeout_s=300)  # noqa: B023 - waited for in this very turn
            first, new = _since(run, killed_at, reached)
            yield {"first_s": first - killed_at, "new_s": new - killed_at, "again": reached - saved, "reached": reached}
            print(f"kill {number + 1} of {options.kills}: {new - killed_at:.1f} s", file=sys.stderr)
    finally:
        _end(job)


def imports() -> float:
    """Seconds until a fresh interpreter has imported what a run needs."""
    started = time.monotonic()
    code = "from tests.support.zygote import _import_everything as f; f()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    return time.monotonic() - started


def report(facts: Facts, found: list[dict[str, Any]], imports_s: float, processes: int) -> str:
    """The result as Markdown."""
    new = [f["new_s"] for f in found]
    met = "met" if statistics.median(new) <= TARGET_S else "**missed**"
    lines = [
        f"# From a kill to the next useful step, {facts.date}", "", facts.text(), "",
        f"The demo's model and data, {processes} processes, a checkpoint every {EVERY} steps; all ranks killed some steps behind one and",
        "started again at once, imports done. Useful is the first step that had not been done before the kill.", "",
        f"Target: at most {TARGET_S:g} s. Median {statistics.median(new):.1f} s, {min(new):.1f} to {max(new):.1f} s: {met}.",
        f"A fresh interpreter spends {imports_s:.1f} s on imports besides.", "",
        "| kill at step | first step after it, s | steps done again | next useful step, s |", "|---|---|---|---|",
        *(f"| {f['reached']} | {f['first_s']:.1f} | {f['again']} | {f['new_s']:.1f} |" for f in found), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def _steps(run: Path) -> tuple[int, int]:
    """The highest step reached, and how many were done."""
    events = _events(run)
    return max((event["step"] for event in events), default=0), len(events)


def _since(run: Path, when: float, reached: int) -> tuple[float, float]:
    """Times of the first step after a moment and of the first new one."""
    after = [event for event in _events(run) if event["time"] > when]
    return after[0]["time"], next(event["time"] for event in after if event["step"] > reached)


def _newest(run: Path) -> int:
    return max((step for step, _ in published_steps(run / "checkpoints")), default=0)


def _end(job: Job) -> None:
    job.signal(signal.SIGKILL)
    job.wait(30)


if __name__ == "__main__":
    sys.exit(main())
