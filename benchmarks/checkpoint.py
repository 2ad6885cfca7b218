"""Saving and loading training state: dstrain against torch.save, DeepSpeed, dcp.save and dcp.async_save, in one interleaved run.

    python benchmarks/checkpoint.py --work SCRATCH [--gigabytes 0.1 0.5 1] [--worlds 1 2] [--rounds 3]

Each figure is a fresh group of processes, which saves once to warm up and then --saves times, and loads once with cold pages; the order
of the systems alternates from round to round; the table gives medians with the least and the greatest. Before each save everything
else on its way to the disk is synced. The stall is the time for which the caller stands still; durable is the time until
all files and their folder are synced. The disk's limit is measured in the same run, by plain writes of the same bytes from as
many processes. What the systems do is in `checkpoint_rank.py`. The result goes to benchmarks/results/ as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from header import Facts

from dstrain.checkpoint.interval import hours_text, mean_failure_s, save_interval

HERE = Path(__file__).resolve().parent
PACKAGES = ("dstrain", "torch", "deepspeed", "safetensors")
Figures = dict[str, Any]

LIMIT = "disk: write and fsync"
ASYNC, ASYNC_PLAIN, SYNC = "dstrain", "dstrain, not read back", "dstrain, synchronous, not read back"
DCP, DCP_ASYNC, DCP_KEPT = "dcp.save", "dcp.async_save", "dcp.async_save, staging kept"
SYSTEMS: dict[str, Figures] = {
    LIMIT: {"system": "raw"},
    ASYNC: {"system": "dstrain", "asynchronous": True, "read_back": True},
    ASYNC_PLAIN: {"system": "dstrain", "asynchronous": True, "read_back": False},
    SYNC: {"system": "dstrain", "asynchronous": False, "read_back": False},
    "torch.save": {"system": "torch"},
    "DeepSpeed save_checkpoint": {"system": "deepspeed"},
    DCP: {"system": "dcp"},
    DCP_ASYNC: {"system": "dcp_async", "kept_staging": False},
    DCP_KEPT: {"system": "dcp_async", "kept_staging": True},
}


def run(job: Figures, *, world: int, work: Path, timeout_s: float) -> Figures | str:
    """One group of processes; its answer, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory(dir=work) as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps({**job, "folder": f"{scratch}/state", "out": f"{scratch}/out.json"}))
        running = []
        for rank in range(world):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            command = [sys.executable, str(HERE / "checkpoint_rank.py"), str(path)]
            log = open(Path(scratch) / f"log-{rank}", "wb")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=HERE.parent))
            log.close()
        failed = ""
        for rank, process in enumerate(running):
            try:
                code = process.wait(timeout_s if not failed else 5)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if code and not failed:
                lines = (Path(scratch) / f"log-{rank}").read_text(errors="replace").strip().splitlines()
                failed = (lines or [f"exit status {code}"])[-1][:300]
        return failed or json.loads(Path(f"{scratch}/out.json").read_text())


def measure(args: argparse.Namespace) -> tuple[list[Figures], dict[str, str]]:
    """All rounds; the same systems in turn, forwards and backwards."""
    found: list[Figures] = []
    failures: dict[str, str] = {}
    names = [name for name in SYSTEMS if args.only in name or name == LIMIT]
    for number in range(args.rounds):
        for world in args.worlds:
            for gigabytes in args.gigabytes:
                for name in names if number % 2 == 0 else names[::-1]:
                    say(f"round {number + 1}: {world} process{'es' if world > 1 else ''}, {gigabytes:g} GB: {name}")
                    job = {**SYSTEMS[name], "gigabytes": gigabytes, "saves": args.saves}
                    answer = run(job, world=world, work=args.work, timeout_s=60 + 60 * gigabytes * (args.saves + 3))
                    if isinstance(answer, str):
                        failures[f"{name}, {world} × {gigabytes:g} GB"] = answer
                        say(f"FAILED: {answer}")
                        continue
                    found.append({"name": name, "world": world, "gigabytes": gigabytes, "round": number, **answer})
    return found, failures


class Table:
    """Figures by system, world and size."""

    def __init__(self, found: list[Figures]) -> None:
        self.found = found
        self.cases = sorted({(f["world"], f["gigabytes"]) for f in found})

    def of(self, name: str, case: tuple[int, float], pick: Callable[[Figures], Sequence[float]]) -> list[float]:
        """What `pick` takes from each process group's answer."""
        return [v for f in self.found if (f["name"], f["world"], f["gigabytes"]) == (name, *case) for v in pick(f)]

    def stall(self, name: str, case: tuple[int, float]) -> list[float]:
        """Seconds per GB."""
        return self.of(name, case, lambda f: [s["stall_s"] / case[1] for s in f["saves"]])

    def durable(self, name: str, case: tuple[int, float]) -> list[float]:
        """GB per second."""
        return self.of(name, case, lambda f: [case[1] / s["durable_s"] for s in f["saves"]])

    def first(self, name: str, case: tuple[int, float]) -> list[float]:
        """Stall of a process's first save, seconds per GB."""
        return self.of(name, case, lambda f: [f["first"]["stall_s"] / case[1]])

    def load(self, name: str, case: tuple[int, float], kind: str = "load") -> list[float]:
        """Seconds per GB, cold."""
        return self.of(name, case, lambda f: [f["loads"][kind] / case[1]] if kind in f["loads"] else [])

    def size(self, name: str, case: tuple[int, float]) -> list[float]:
        """Bytes on disk per byte of state."""
        return self.of(name, case, lambda f: [f["size_bytes"] / case[1] / 1e9])


def render(data: Figures) -> str:
    """The page as Markdown."""
    table = Table(data["results"])
    parts = [
        f"# Saving and loading training state, {data['head']['date']}",
        data["head_text"],
        f"{data['rounds']} interleaved rounds of {data['saves']} saves; one fresh process group a row and round, after one save to warm up; "
        "median (least to greatest). GB are 10⁹ bytes of fp32 weights and two moments, all ranks together. Nothing trains meanwhile. "
        "Loads begin with the files' pages dropped; dstrain's hashes every file first, which no other does.",
        "## Targets\n\n| target | measured | |\n|---|---|---|\n" + "\n".join(_targets(table)),
        *(_case(table, case) for case in table.cases),
    ]
    if data["failures"]:
        parts.append("## Not measured\n\n" + "\n".join(f"- {name}: {why}" for name, why in data["failures"].items()))
    return "\n\n".join(parts) + "\n"


def _case(table: Table, case: tuple[int, float]) -> str:
    world, gigabytes = case
    lines = [
        f"## {gigabytes:g} GB by {world} process{'es' if world > 1 else ''}\n",
        "| | stall, s/GB | first stall, s/GB | durable, GB/s | of the limit | load, s/GB | bytes on disk per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    limit = _median(table.durable(LIMIT, case))
    for name in SYSTEMS:
        durable = table.durable(name, case)
        if not durable:
            continue
        stall = _spread(table.stall(name, case)) if name != LIMIT else ""
        first = _spread(table.first(name, case)) if name != LIMIT else ""
        load = _spread(table.load(name, case))
        if plain := table.load(name, case, "load, not verified"):
            load += f"; not verified {_spread(plain)}"
        share = f"{_median(durable) / limit:.2f}" if limit else ""
        lines.append(
            f"| {name} | {stall} | {first} | {_spread(durable)} | {share} | {load} | {_median(table.size(name, case)):.2f} |"
        )
    return "\n".join(lines)


def _targets(table: Table) -> list[str]:
    """One row a target and case; the durable ones compare saves that nobody reads back, as no peer does."""
    rows = []
    for case in table.cases:
        where = f"{case[1]:g} GB, {case[0]} process{'es' if case[0] > 1 else ''}"
        stall, plain = table.stall(ASYNC, case), table.durable(ASYNC_PLAIN, case)
        if stall:
            rows.append(_row(f"stall ≤ 0.35 s/GB, {where}", _median(stall), 0.35, "s/GB", most=True))
        if stall and (theirs := table.stall(DCP_ASYNC, case)):
            rows.append(_row(f"stall ≥ 3× less than dcp.async_save, {where}", _median(theirs) / _median(stall), 3, "×"))
        if plain and (limit := table.durable(LIMIT, case)):
            rows.append(_row(f"durable ≥ 0.7 of the disk's limit, {where}", _median(plain) / _median(limit), 0.7, ""))
        if plain and (theirs := table.durable(DCP, case)):
            rows.append(_row(f"durable ≥ 2.5× dcp.save, {where}", _median(plain) / _median(theirs), 2.5, "×"))
    case = max(table.cases)
    if stall := table.stall(ASYNC, case):
        # A base model's state, 1.3 GB, on 8 devices; the default cap and planning value.
        cost = 1.3 * _median(stall)
        tau = save_interval(
            cost, mean_failure_s=mean_failure_s(devices=8, device_hours_per_failure=50_000), longest_s=1800
        )
        name = f"overhead ≤ 1 % at the chosen interval ({hours_text(tau)}), 1.3 GB of a base model"
        rows.append(_row(name, 100 * cost / tau, 1, "%", most=True))
    return rows


def _row(name: str, value: float, bound: float, unit: str, *, most: bool = False) -> str:
    met = value <= bound if most else value >= bound
    return f"| {name} | {value:.3g} {unit} | {'met' if met else '**missed**'} |"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "failed"
    return f"{_median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    args = parse()
    facts = Facts.now(__file__, packages=PACKAGES)
    args.work.mkdir(parents=True, exist_ok=True)
    need = 3e9 * max(args.gigabytes)
    if shutil.disk_usage(args.work).free < need:
        sys.exit(f"{args.work}: {need / 1e9:.1f} GB must be free")
    results, failures = measure(args)
    data = {
        "head": facts.to_json(), "head_text": facts.text(), "rounds": args.rounds, "saves": args.saves, "results": results,
        "failures": failures,
    }  # fmt: skip
    text = render(data)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{facts.date}-{args.name}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder on the disk that is to be measured")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="sizes of the state")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3, help="measured saves of each process group")
    parser.add_argument("--only", default="", help="only systems with this in their name, and the disk's limit")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--name", default="checkpoint", help="of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
