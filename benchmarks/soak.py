"""The full tier of the fault suite: how often a checkpoint was attacked, and how often what was promised was not kept.

    python benchmarks/soak.py                                      (about an hour on two cores)
    python benchmarks/soak.py --parts training --training-kills 40

Runs the trial functions of tests/support with many more trials than `make test` does. Every trial compares bytes; none is
tried twice. For each part: trials, failures, and the upper end of the one-sided 95 % interval of the failure rate (Clopper
and Pearson, 1934; 3/n for no failure in n). The last part attacks a naive saver in the same way, and must fail. The result
goes to benchmarks/results/, also when something failed; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests.support lies beside this folder

from header import Facts

from tests.support import naive_saver
from tests.support.damage_trials import damages
from tests.support.storage_trials import (
    SCENARIOS,
    Tally,
    every_crash_point,
    every_storage_error,
    fast_bench,
    power_losses,
    random_kills,
)

HERE = Path(__file__).resolve().parent
PACKAGES = ("dstrain", "torch", "deepspeed", "safetensors")
WORLDS = (1, 2, 3)
KILLS_A_TASK, DAMAGES_A_TASK = 250, 500


@dataclass(frozen=True)
class Part:
    """One kind of attack."""

    name: str
    promise: str
    """Number in the list of promises (docs/faults.md)."""
    what: str
    tasks: Callable[[argparse.Namespace], list[tuple[Any, ...]]]
    """Arguments of `_task`, for worker processes; empty for what runs in this one."""
    is_control: bool = False


def _task(kind: str, seed: int, *arguments: Any) -> Tally:
    """One share of a part, in a process and a scratch folder of its own."""
    with fast_bench() as bench:
        if kind == "kills":
            return random_kills(bench, arguments[0], seed=seed)
        if kind == "points":
            return every_crash_point(bench, SCENARIOS[arguments[0]], arguments[1], seed=seed)
        if kind == "errors":
            return every_storage_error(bench, SCENARIOS[arguments[0]], arguments[1])
        if kind == "power":
            return power_losses(bench, SCENARIOS[arguments[0]], arguments[1], per_moment=arguments[2], seed=seed)
        if kind == "damages":
            return damages(bench, arguments[0], seed=seed)
        if kind == "naive kills":
            return naive_saver.kills(bench, arguments[0], seed=seed)
        if kind == "naive power":
            return naive_saver.power_losses(bench, per_moment=arguments[0], seed=seed)
    raise ValueError(kind)


def _shares(total: int, size: int) -> list[int]:
    return [min(size, total - begin) for begin in range(0, total, size)]


def _everywhere(kind: str, seed: int, *more: Any, worlds: Sequence[int] = WORLDS) -> list[tuple[Any, ...]]:
    return [(kind, seed, n, world, *more) for n in range(len(SCENARIOS)) for world in worlds]


PARTS = (
    Part("points", "P1", "SIGKILL at every operation of a save, every rank, 1 to 3 ranks, torn writes too",
         lambda o: _everywhere("points", o.seed)),
    Part("kills", "P1", "SIGKILL of random ranks at random instants and operations of a save",
         lambda o: [("kills", o.seed + n, share) for n, share in enumerate(_shares(o.storage_kills, KILLS_A_TASK))]),
    Part("errors", "P7", "every operation of a save meets EIO, ENOSPC, EDQUOT, EROFS, EACCES, ESTALE, a short write, a lost answer; once, for good",
         lambda o: _everywhere("errors", o.seed, worlds=(1, 2))),
    Part("power", "P9", "power lost behind every operation of a save; any part of what was not synced is gone",
         lambda o: _everywhere("power", o.seed, o.power_draws)),
    Part("damages", "P8", "bits, ends, swaps, mixtures, losses, forgeries, links in one or more checkpoints",
         lambda o: [("damages", o.seed + n, share) for n, share in enumerate(_shares(o.damages, DAMAGES_A_TASK))]),
    Part("training", "P1, P2", "SIGKILL of real ranks in training, started again, end compared with an undisturbed run's", lambda o: []),
    Part("control", "", "the same kills against a naive saver", lambda o: [("naive kills", o.seed, o.control_kills)], is_control=True),
    Part("control, power", "", "the same power losses against a naive saver", lambda o: [("naive power", o.seed, 200)], is_control=True),
)  # fmt: skip


def upper_bound(failures: int, trials: int, confidence: float = 0.95) -> float:
    """Upper end of the one-sided Clopper-Pearson interval of a rate: the p at which so few failures have probability 1 - confidence."""
    if failures >= trials:
        return 1.0
    low, high = failures / trials, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(failures, trials, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(failures: int, trials: int, rate: float) -> float:
    """Probability of at most so many failures in so many trials."""
    if rate <= 0 or rate >= 1:
        return float(rate <= 0)
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(failures + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, logs))


def run_part(part: Part, options: argparse.Namespace) -> tuple[Tally, float]:
    """All trials of one part; returns them and the seconds they took."""
    started = time.monotonic()
    if part.name == "training":
        return _training(options), time.monotonic() - started
    tally = Tally()
    tasks = part.tasks(options)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done, result in enumerate(pool.map(_task, *zip(*[_padded(task) for task in tasks])), 1):
            tally += result
            _say(part, tally, done / len(tasks), started)
    print(file=sys.stderr)
    return tally, time.monotonic() - started


def _padded(task: tuple[Any, ...], length: int = 5) -> tuple[Any, ...]:
    return task + (None,) * (length - len(task))


def _training(options: argparse.Namespace) -> Tally:
    from tests.support.training_trials import TrainingBench, random_kills
    from tests.support.zygote import Zygote

    started = time.monotonic()
    part = next(p for p in PARTS if p.name == "training")
    with tempfile.TemporaryDirectory(prefix="dstrain-soak-", dir=options.work) as scratch:
        with Zygote(Path(scratch) / "zygote.log") as zygote:
            bench = TrainingBench(Path(scratch) / "runs", zygote)
            tally = random_kills(
                bench, options.training_kills, seed=options.seed,
                say=lambda t: _say(part, t, t.trials / options.training_kills, started),
            )  # fmt: skip
    print(file=sys.stderr)
    return tally


def _say(part: Part, tally: Tally, share: float, started: float) -> None:
    spent = time.monotonic() - started
    left = spent * (1 - share) / share
    print(f"\r{part.name}: {tally.trials} trials, {len(tally.failures)} failures, {left / 60:.0f} min left ", end="", file=sys.stderr)  # fmt: skip


def report(facts: Facts, rows: list[dict[str, Any]], seed: int) -> str:
    """The result as Markdown."""
    lines = [
        f"# Kills, errors, power loss and damage, {facts.date}", "", facts.text(), "",
        f"Seed {seed}. Bound: one-sided 95 % (Clopper-Pearson) of the rate of failures. Situations: operations attacked, states found,",
        "combinations of damage, or settings of training. Power loss is a model of a disk (tests/support/crash_disk.py), the rest are",
        "real processes, files and signals.", "",
        "| promise | attack | trials | situations | failures | 95 % bound | minutes |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        expected = " (must be many)" if row["is_control"] else ""
        bound = "" if row["is_control"] else f"{row['bound']:.2%}" if row["bound"] > 1e-3 else f"{row['bound']:.4%}"
        lines.append(
            f"| {row['promise']} | {row['what']} | {row['trials']:,} | {row['situations']:,} | {row['failures']}{expected} | {bound} | "
            f"{row['seconds'] / 60:.1f} |"
        )
    for row in rows:
        if row.get("phases"):
            lost = row["lost_steps"]
            lines += [
                "",
                f"Training: killed in {', '.join(f'{name} {count}' for name, count in sorted(row['phases'].items()))}; "
                f"{row['during_a_save']} while a checkpoint was being written. Saved every {row['every']} steps; a kill lost "
                f"{sum(lost) / len(lost):.1f} steps on average, {max(lost)} at most.",
            ]
    failed = [failure for row in rows if not row["is_control"] for failure in row["first_failures"]]
    return "\n".join([*lines, *(["", "## Failures", "", *(f"- {f}" for f in failed)] if failed else []), ""])


def row_of(part: Part, tally: Tally, seconds: float) -> dict[str, Any]:
    """One part's figures, JSON-able."""
    row: dict[str, Any] = {
        "part": part.name, "promise": part.promise, "what": part.what, "is_control": part.is_control, "trials": tally.trials,
        "situations": tally.points, "failures": len(tally.failures), "bound": upper_bound(len(tally.failures), tally.trials),
        "seconds": round(seconds, 1), "first_failures": [f[:600] for f in tally.failures[:20]],
    }  # fmt: skip
    if part.name == "training":
        from tests.support.training_trials import EVERY

        row |= {
            name: getattr(tally, name) for name in ("phases", "lost_steps", "during_a_save")
        } | {"every": EVERY}  # fmt: skip
    return row


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--storage-kills", type=int, default=10_000, help="random kills of a save")
    parser.add_argument("--training-kills", type=int, default=300, help="kills of real training")
    parser.add_argument("--power-draws", type=int, default=150, help="losses of power behind each operation")
    parser.add_argument("--damages", type=int, default=10_000, help="damaged sets of checkpoints")
    parser.add_argument("--control-kills", type=int, default=600, help="kills of the naive saver")
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--workers", type=int, default=2, help="processes for the parts without training")
    parser.add_argument("--work", type=Path, default=None, help="scratch folder of the training runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--name", default="soak", help="of the result files")
    options = parser.parse_args()
    facts = Facts.now(__file__, packages=PACKAGES)
    rows = [row_of(part, *run_part(part, options)) for part in PARTS if part.name in options.parts]
    text = report(facts, rows, options.seed)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{facts.date}-{options.name}.md").write_text(text)
    (options.out / f"{facts.date}-{options.name}.json").write_text(
        json.dumps({"facts": facts.to_json(), "seed": options.seed, "rows": rows}, indent=1) + "\n"
    )
    blind = [row["part"] for row in rows if row["is_control"] and row["failures"] < 0.05 * row["trials"]]
    if blind:
        print(f"the naive saver came through ({', '.join(blind)}): the harness is blind", file=sys.stderr)
    return int(bool(blind) or any(row["failures"] for row in rows if not row["is_control"]))


if __name__ == "__main__":
    sys.exit(main())
