"""The plan alone: time and memory of an epoch's order against peers, and how well it shuffles a sorted corpus.

    python benchmarks/plan.py                                    # without MosaicML
    python benchmarks/plan.py --mosaicml peers/mosaicml/bin/python   # an interpreter that has mosaicml-streaming 0.13

Cost: what must be computed before an epoch's first batch is known, at 1e7 and 1e8 rows, each in a process of its own; memory
is the growth of the highest resident size. Peers: MosaicML's py1e (its default; blocks of 2^18, 8 canonical nodes, shards of
10,000 rows) and a shuffled arange as OLMo has it (uint32, PCG64). dstrain's blocks hold 128 rows; its figure includes
the first global batch of 4,096 rows. Beyond the epoch, a batch anywhere is timed.

Quality: 2,000 shards of 1,000 rows sorted by origin, global batch 512, the worst case. VIF is the variance of the batches'
means over that of independent draws (1 is ideal), `distinct` the mean number of shards in a batch over that of independent draws, span the
rows that must be within reach over the whole job. Peers' orders are their own functions or, for webdataset, its documented
pipeline simulated on row numbers: shards split among ranks and workers, a buffer of 1,000.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from header import Facts

HERE = Path(__file__).resolve().parent
SHARDS, SHARD_ROWS, BATCH, BLOCK_ROWS = 2000, 1000, 512, 128
COSTS = ("dstrain", "arange + shuffle", "MosaicML py1e")

# --- cost: each function runs in a process of its own -------------------------------------------------------------------


def cost_dstrain(rows: int) -> dict[str, float]:
    from dstrain.data.plan import Plan

    counts = np.full(rows // BLOCK_ROWS, BLOCK_ROWS)

    def first_batch() -> Any:
        plan = Plan.single(counts, seed=1, source="train", global_batch=4096, window_rows=8192)
        plan.slots(0, 0, 4096)
        return plan

    found, plan = _timed(first_batch)
    far = plan.orders[0].rows_per_epoch // 4096 // 2
    times = []
    for step in range(far, far + 20):
        started = time.perf_counter()
        plan.slots(step, 0, 4096)
        times.append(time.perf_counter() - started)
    return {**found, "batch_ms": 1e3 * statistics.median(times)}


def cost_arange(rows: int) -> dict[str, float]:
    def shuffled() -> Any:
        order = np.arange(rows, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed=1)).shuffle(order)
        return order

    return _timed(shuffled)[0]


def cost_py1e(rows: int) -> dict[str, float]:
    from streaming.base.shuffle import get_shuffle

    sizes = np.full(rows // 10_000, 10_000, dtype=np.int64)
    return _timed(lambda: get_shuffle("py1e", sizes, 8, 1, 0, 1 << 18))[0]


def _timed(make: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    before = _peak_mib()
    started, cpu = time.perf_counter(), time.process_time()
    made = make()
    found = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    return {**found, "mib": _peak_mib() - before}, made


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- quality: each function gives the numbers of an epoch's rows in training order ----------------------------------------


def order_dstrain(lanes: int, window_blocks: int, block_rows: int) -> np.ndarray:
    from dstrain.data.plan import Plan

    counts = np.full(SHARDS * SHARD_ROWS // block_rows, block_rows)
    plan = Plan.single(
        counts, seed=1, source="train", global_batch=BATCH, lanes=lanes, window_rows=window_blocks * block_rows
    )
    planned = plan.steps(0, plan.orders[0].rows_per_epoch // BATCH)
    return planned.block * block_rows + planned.row


def order_webdataset(ranks: int, workers: int, buffer: int, initial: int) -> np.ndarray:
    """Shards split by node and worker, `shuffle(buffer)` in each worker, batches from the workers in turn."""
    random = np.random.default_rng(1)
    shards = random.permutation(SHARDS)
    per_worker = BATCH // ranks
    streams = [
        [_buffered(shards[r::ranks][w::workers], random, buffer, initial) for w in range(workers)] for r in range(ranks)
    ]
    batches: list[np.ndarray] = []
    for turn in range(SHARDS * SHARD_ROWS // BATCH):
        parts = [list(_take(streams[r][turn % workers], per_worker)) for r in range(ranks)]
        if any(len(part) < per_worker for part in parts):  # the first stream has ended, and with it even batches
            break
        batches.append(np.concatenate([np.asarray(part) for part in parts]))
    return np.concatenate(batches)


def _take(stream: Iterator[int], count: int) -> Iterator[int]:
    for _ in range(count):
        row = next(stream, None)
        if row is not None:
            yield row


def _buffered(shards: np.ndarray, random: np.random.Generator, size: int, initial: int) -> Iterator[int]:
    """webdataset.filters._shuffle: grow the buffer two for one, give out a random one."""
    buffer: list[int] = []
    rows = (int(shard) * SHARD_ROWS + row for shard in shards for row in range(SHARD_ROWS))
    for row in rows:
        buffer.append(row)
        if len(buffer) < size:
            following = next(rows, None)
            if following is not None:
                buffer.append(following)
        if len(buffer) >= initial:
            yield _pick(buffer, random)
    while buffer:
        yield _pick(buffer, random)


def _pick(buffer: list[int], random: np.random.Generator) -> int:
    at = int(random.random() * len(buffer))
    buffer[at], buffer[-1] = buffer[-1], buffer[at]
    return buffer.pop()


def order_py1e(block: int, nodes: int) -> list[int]:
    """Rows as `nodes` ranks of one worker take them: a canonical node each, a part of the batch from each."""
    from streaming.base.shuffle import get_shuffle

    order = get_shuffle("py1e", np.full(SHARDS, SHARD_ROWS, dtype=np.int64), nodes, 1, 0, block)
    per_node = BATCH // nodes
    parts = order.reshape(nodes, -1)
    steps = parts.shape[1] // per_node
    return parts[:, : steps * per_node].reshape(nodes, steps, per_node).transpose(1, 0, 2).reshape(-1).tolist()


def quality(order: np.ndarray) -> dict[str, float]:
    shards = (order[: len(order) // BATCH * BATCH] // SHARD_ROWS).reshape(-1, BATCH)
    inflation = []
    for seed in range(8):
        value = np.random.default_rng(seed).standard_normal(SHARDS)
        inflation.append(value[shards].mean(axis=1).var() / (value.var() / BATCH))
    independent = SHARDS * (1 - (1 - 1 / SHARDS) ** BATCH)
    distinct = np.mean([len(np.unique(batch)) for batch in shards]) / independent
    return {
        "vif": float(np.mean(inflation)),
        "distinct": float(distinct),
        "rows": len(np.unique(order)) / (SHARDS * SHARD_ROWS),
    }


METHODS: dict[str, tuple[int, Callable[[], Any]]] = {
    "dstrain, 64 lanes, windows of 64 blocks x 128": (64 * 64 * 128, lambda: order_dstrain(64, 64, 128)),
    "dstrain, 64 lanes, 32 x 256": (64 * 32 * 256, lambda: order_dstrain(64, 32, 256)),
    "dstrain, 256 lanes, 16 x 128": (256 * 16 * 128, lambda: order_dstrain(256, 16, 128)),
    "dstrain, 8 lanes, 64 x 128 (a small job)": (8 * 64 * 128, lambda: order_dstrain(8, 64, 128)),
    "webdataset shuffle(1000), 1 rank x 8 workers": (8 * 1000, lambda: order_webdataset(1, 8, 1000, 100)),
    "webdataset shuffle(1000), 8 ranks x 4 workers": (32 * 1000, lambda: order_webdataset(8, 4, 1000, 100)),
    "webdataset shuffle(10000, initial=5000), 8 x 4": (320 * 1000, lambda: order_webdataset(8, 4, 10_000, 5000)),
    "MosaicML py1e 2^15, 8 canonical nodes": (8 << 15, lambda: order_py1e(1 << 15, 8)),
    "MosaicML py1e 2^18, 8 canonical nodes": (8 << 18, lambda: order_py1e(1 << 18, 8)),
}

# --- processes and report -----------------------------------------------------------------------------------------------------


def in_process(python: str | None, *arguments: str) -> Any:
    """The answer of a fresh process, or a text that says why there is none."""
    if python is None:
        return "not installed (--mosaicml)"
    done = subprocess.run([python, __file__, "--worker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1][:200]
    return json.loads(done.stdout.splitlines()[-1])


def worker(what: str, name: str, rows: str = "0") -> None:
    if what == "cost":
        answer: Any = dict(zip(COSTS, (cost_dstrain, cost_arange, cost_py1e)))[name](int(rows))
    else:
        answer = quality(np.asarray(METHODS[name][1]()))
    print(json.dumps(answer))


def cost_table(args: argparse.Namespace) -> list[str]:
    lines = [
        "| rows | order | seconds | dstrain is | growth of memory, MiB | a batch at half of the epoch, ms |",
        "|---|---|---|---|---|---|",
    ]
    for rows in args.rows:
        runs: dict[str, list[Any]] = {name: [] for name in COSTS}
        for round_ in range(args.rounds):
            for name in COSTS if round_ % 2 == 0 else COSTS[::-1]:
                python = args.mosaicml if "MosaicML" in name else sys.executable
                print(f"round {round_ + 1}: {name}, {rows} rows", file=sys.stderr, flush=True)
                runs[name].append(in_process(python, "cost", name, str(rows)))
        lines += [_cost_row(rows, name, runs) for name in COSTS]
    return lines


def _cost_row(rows: int, name: str, runs: dict[str, list[Any]]) -> str:
    bad = next((run for run in runs[name] if isinstance(run, str)), None)
    if bad:
        return f"| {rows:.0e} | {name} | {bad} | | | |"
    seconds = [run["seconds"] for run in runs[name]]
    ours = runs["dstrain"]
    ratio = statistics.median(t / o["seconds"] for t, o in zip(seconds, ours)) if not isinstance(ours[0], str) else 0.0
    growth = statistics.median(run["mib"] for run in runs[name])
    less = growth / max(1.0, statistics.median(run["mib"] for run in ours))
    target = (
        ""
        if name == "dstrain"
        else f" ({'met' if ratio >= (20 if 'MosaicML' in name else 5) else '**missed**'})"
        if rows >= 1e8
        else ""
    )
    batch = f"{statistics.median(r['batch_ms'] for r in runs[name]):.1f}" if name == "dstrain" else ""
    faster = "" if name == "dstrain" else f"{ratio:.0f}× faster"
    spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    return f"| {rows:.0e} | {name} | {spread} | {faster}{target} | {growth:.0f} ({less:.0f}×) | {batch} |"


def quality_table(args: argparse.Namespace) -> list[str]:
    lines = ["| order | span, rows | distinct shards | VIF | rows of the epoch | |", "|---|---|---|---|---|---|"]
    for name, (span, _) in METHODS.items():
        print(name, file=sys.stderr, flush=True)
        found = in_process(args.mosaicml if "MosaicML" in name else sys.executable, "quality", name)
        if isinstance(found, str):
            lines.append(f"| {name} | {span:,} | {found} | | | |")
            continue
        is_target = name.startswith("dstrain") and span > 500_000
        verdict = ("met" if found["vif"] <= 1.15 and found["distinct"] >= 0.93 else "**missed**") if is_target else ""
        lines.append(
            f"| {name} | {span:,} | {found['distinct']:.1%} | {found['vif']:.2f} | {found['rows']:.1%} | {verdict} |"
        )
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mosaicml", help="interpreter of an environment with mosaicml-streaming")
    parser.add_argument("--rows", type=lambda text: int(float(text)), nargs="+", default=[10**7, 10**8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    args = parser.parse_args()
    peer = {"mosaicml-streaming": args.mosaicml} if args.mosaicml else {}
    facts = Facts.now(__file__, packages=("dstrain", "numpy", "webdataset"), interpreters=peer)
    text = "\n".join([
        f"# The plan's cost and its shuffle, {facts.date}\n",
        f"{facts.text()}\n",
        "## Before an epoch's first batch is known\n",
        "Targets at 1e8 rows: ≥ 20× MosaicML py1e, ≥ 5× arange + shuffle. Median (least to greatest), a fresh process each.\n",
        *cost_table(args),
        "\n## Batches of a sorted corpus\n",
        "2,000 shards of 1,000 rows, batch 512. Targets within a span of 0.53 M rows: VIF ≤ 1.15, distinct ≥ 93 % of independent draws.\n",
        *quality_table(args), "",
    ])  # fmt: skip
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{facts.date}-plan.md").write_text(text)


if __name__ == "__main__":
    main()
