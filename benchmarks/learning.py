"""What each learning switch of dstrain is worth at a small scale: held-out loss after the same tokens, several seeds.

    python benchmarks/learning.py --work scratch/learning                           # the embedded novels
    python benchmarks/learning.py --corpus my/*.jsonl.gz --work scratch/mine --hidden 128 --layers 6 --vocab 8000 --steps 2000

Every run is `dstrain pretrain` on a configuration, in this process, on one CPU thread. Optimizers are tried at three peak rates,
and at more while the best is the first or last (`--widen`); schedules at the baseline's best rate and twice that; all else at the
baseline's best. The sweep is on the first seed; the best rate then runs on the others. The baseline also runs for half and for
twice the tokens: how many tokens it would need for an arm's loss is read off that curve, on a logarithmic scale, so winners and
losers are told apart in tokens. Wall time plays no part; CPU seconds are printed, and are rough.

Runs that are done are kept below --work and found again: a benchmark that was interrupted goes on. `--seconds` begins no new run
after that time and reports what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from header import ROOT, Facts
from learning_arms import BASELINE, MASK_RATE, Arm, Size, arms, settings, training_flops

from dstrain.base.errors import ExitCode
from dstrain.cli.main import main as dstrain

PACKAGES = ("dstrain", "torch", "deepspeed", "transformers")
LENGTHS = (0.5, 2.0)
"""Of the baseline's other runs, in full runs."""


@dataclass(frozen=True)
class Found:
    """A run that is done."""

    arm: str
    rate: float
    seed: int
    length: float
    loss: float
    """Held-out; infinite if the run failed."""
    accuracy: float
    averaged: float | None
    """Held-out loss of the mean of the last checkpoints."""
    unigram: float
    tokens: int
    cpu_s: float


class OutOfTimeError(Exception):
    """No run may begin any more."""


class Bench:
    """Makes runs, once each."""

    def __init__(self, work: Path, size: Size, *, seconds: float, results: list[Found]) -> None:
        self.work, self.size, self.results = work, size, results
        self._ends = time.monotonic() + seconds

    def run(self, arm: Arm, *, rate: float, seed: int, length: float = 1.0) -> Found:
        """The run of an arm, found below the folder or made now."""
        size = replace(self.size, steps=max(1, round(self.size.steps * length)))
        config = settings(size, arm, rate=rate, seed=seed)
        if arm.grown:
            half = size.half()
            config["model"]["init_from_smaller"] = str(
                self._pretrained(settings(half, Arm("half"), rate=rate, seed=seed))
            )
        folder = self._pretrained(config)
        found = self._found(folder, arm, rate=rate, seed=seed, length=length)
        if found not in self.results:
            self.results.append(found)
            averaged = "" if found.averaged is None else f", averaged {found.averaged:.4f}"
            print(
                f"{arm.name}, rate {rate:g}, seed {seed}, length {length:g}: loss {found.loss:.4f}{averaged}",
                flush=True,
            )
        return found

    def _pretrained(self, config: dict[str, Any]) -> Path:
        """The folder of a run that is over."""
        config["data"]["path"] = str(self.work / "shards")
        name = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.work / "runs" / name
        if not (folder / "done.json").exists():
            if time.monotonic() > self._ends:
                raise OutOfTimeError
            folder.mkdir(parents=True, exist_ok=True)
            path = folder.with_suffix(".yaml")
            path.write_text(yaml.safe_dump({"run_folder": str(folder), **config}))
            began = time.process_time()
            code = dstrain(["pretrain", str(path)])
            if code not in (0, ExitCode.NO_PROGRESS):  # stopped from outside, or wrong: no finding
                raise SystemExit(code)
            (folder / "done.json").write_text(json.dumps({"code": code, "cpu_s": time.process_time() - began}))
        return folder

    def _found(self, folder: Path, arm: Arm, *, rate: float, seed: int, length: float) -> Found:
        done = json.loads((folder / "done.json").read_text())
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        last = [e["metrics"] for e in events if e["event"] == "evaluated"][-1]
        averaged = None
        if failed := done["code"] != 0:
            last = {**last, "loss": math.inf, "accuracy": 0.0}
        if arm.average and not failed:
            averaged = self._scored(folder, "--average", f"last:{arm.average}")["loss"]
        return Found(
            arm.name, rate, seed, length, last["loss"], last["accuracy"], averaged, last["unigram_accuracy"],
            max((e["tokens"] for e in events if "tokens" in e), default=0), done["cpu_s"],
        )  # fmt: skip

    def _scored(self, folder: Path, *words: str) -> dict[str, float]:
        """What `dstrain evaluate` prints, asked once."""
        kept = folder / "scored.json"
        if not kept.exists():
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                code = dstrain(["evaluate", str(folder), *words])
            printed = re.search(r"^\{$.*?^\}$", out.getvalue(), re.MULTILINE | re.DOTALL)
            if code or printed is None:
                raise SystemExit(f"dstrain evaluate {folder} {' '.join(words)} ended with {code}: {out.getvalue()}")
            kept.write_text(printed[0])
        return json.loads(kept.read_text())  # type: ignore[no-any-return]


def prepare(corpus: Sequence[str], work: Path, vocab: int) -> None:
    """Tokenizer and shards, by the public commands."""
    if (work / "shards" / "train").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    for command in (
        ["tokenizer", "train", "--input", *corpus, "--vocab-size", str(vocab), "--lowercase", "--out", str(work / "tok")],
        ["shards", "build", "--input", *corpus, "--tokenizer", str(work / "tok"), "--out", str(work / "shards"), "--validation-fraction", "0.05"],
    ):  # fmt: skip
        if code := dstrain(command):
            raise SystemExit(f"dstrain {' '.join(command)} ended with {code}")


def sweep(bench: Bench, arm: Arm, rates: Iterable[float], *, seed: int, widen: int) -> float | None:
    """The best of the rates, and of further ones while the best lies at an end of them."""
    losses: dict[float, float] = {}
    for rate in rates:
        with contextlib.suppress(OutOfTimeError):
            losses[rate] = bench.run(arm, rate=rate, seed=seed).loss
    for _ in range(widen if arm.is_swept and losses else 0):
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            break
        further = best * 2 if best == max(losses) else best / 2
        with contextlib.suppress(OutOfTimeError):
            losses[further] = bench.run(arm, rate=further, seed=seed).loss
    return min(losses, key=losses.__getitem__) if losses else None


def measure(bench: Bench, chosen: Sequence[Arm], *, seeds: Sequence[int], widen: int) -> dict[str, float]:
    """All runs that there is time for or that were made before; the best rate of each arm that has some."""
    best: dict[str, float] = {}
    for arm in chosen:
        rates = arm.rates or [best[BASELINE] * factor for factor in arm.factors]
        if (found := sweep(bench, arm, rates, seed=seeds[0], widen=widen)) is not None:
            best[arm.name] = found
    others = [(arm, seed, 1.0) for seed in seeds[1:] for arm in chosen]
    others += [(chosen[0], seed, length) for seed in seeds for length in LENGTHS]
    for arm, seed, length in others:
        if arm.name in best:
            with contextlib.suppress(OutOfTimeError):
                bench.run(arm, rate=best[arm.name], seed=seed, length=length)
    return best


def tokens_needed(curve: dict[float, float], loss: float) -> tuple[float, str]:
    """Full runs of the baseline that give a loss, by its (falling) losses at several lengths; and on which side of them it lies.

    Between two lengths the loss is taken to be linear in the logarithm of the length.
    """
    lengths = sorted(curve)
    if loss >= curve[lengths[0]]:
        return lengths[0], "<"
    for short, long in pairwise(lengths):
        if curve[short] > loss >= curve[long]:
            way = (curve[short] - loss) / (curve[short] - curve[long])
            return math.exp(math.log(short) + way * math.log(long / short)), ""
    return lengths[-1], ">"


def _is_falling(curve: dict[float, float]) -> bool:
    losses = [curve[length] for length in sorted(curve)]
    return len(losses) > 1 and all(a > b for a, b in pairwise(losses))


def summary(
    results: Sequence[Found], chosen: Sequence[Arm], best: dict[str, float], size: Size
) -> list[dict[str, Any]]:
    """A row for each arm: what was found at its best rate, paired with the baseline of the same seed."""
    rows = []
    curves: dict[int, dict[float, float]] = {}
    for found in results:
        if found.arm == BASELINE and found.rate == best.get(BASELINE):
            curves.setdefault(found.seed, {})[found.length] = found.loss
    for arm in chosen:
        mine = [f for f in results if f.arm == arm.name and f.rate == best.get(arm.name) and f.length == 1.0]
        for name, averaged in [(arm.name, False), *([(f"{arm.name} (averaged)", True)] if arm.average else [])]:
            losses = {f.seed: f.averaged if averaged and f.averaged is not None else f.loss for f in mine}
            pairs = [(seed, loss) for seed, loss in losses.items() if 1.0 in curves.get(seed, {})]
            if not pairs:
                continue
            flops = statistics.fmean(
                training_flops(size, arm, seed=s) / training_flops(size, chosen[0], seed=s) for s, _ in pairs
            )
            needed = [tokens_needed(curves[s], loss) for s, loss in pairs if _is_falling(curves[s])]
            rows.append({
                "name": name, "rate": best[arm.name], "losses": dict(pairs), "loss": statistics.fmean(v for _, v in pairs),
                "differences": [loss - curves[s][1.0] for s, loss in pairs],
                "accuracy": None if averaged else statistics.fmean(f.accuracy for f in mine if f.seed in losses),
                "share": [(1 / n, {"<": ">", ">": "<", "": ""}[side]) for n, side in needed], "flops": flops,
                "cpu_s": statistics.fmean(f.cpu_s for f in mine),
            })  # fmt: skip
    return rows


def report(
    facts: Facts, size: Size, results: Sequence[Found], chosen: Sequence[Arm], best: dict[str, float], name: str, folder: Path
) -> None:  # fmt: skip
    """Print and keep the result."""
    rows = summary(results, chosen, best, size)
    seeds = sorted({f.seed for f in results})
    lines = [
        f"# What the learning switches are worth at a small scale, {facts.date}", "", facts.text(), "",
        f"ModernBERT, hidden {size.hidden}, {size.layers} layers, vocabulary {size.vocab}; {size.steps} steps of {size.rows} rows of "
        f"{size.row_length}: {size.tokens / 1e6:.2f} M tokens a run; masking {100 * MASK_RATE:g} %, weight decay, moments and clipping dstrain's defaults; fp32, one thread. "
        f"Held-out: {size.held_out_rows} rows, the same masks for all runs of a seed. Seeds {', '.join(map(str, seeds))}.", "",
        "Difference: held-out loss less the baseline's of the same seed, one number a seed; below 0 is better. Tokens: this run's over those "
        "that the baseline needs for the same loss, read off the baseline at half, one and two times the tokens, one number a seed; below 1 is better. "
        "FLOPs: arithmetic of the run over the baseline's, by formula. Tokens times FLOPs is the share of the arithmetic.", "",
        "| switch | peak rate | loss | accuracy | difference | tokens | FLOPs | CPU s (rough) |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
        differences = ", ".join(f"{d:+.3f}" for d in row["differences"])
        shares = ", ".join(f"{side}{share:.2f}" for share, side in row["share"]) or "not measured"
        lines.append(
            f"| {row['name']} | {row['rate']:g} | {row['loss']:.3f} | {accuracy} | {differences} | {shares} | {row['flops']:.2f} | {row['cpu_s']:.0f} |"
        )
    unigram = statistics.fmean(f.unigram for f in results)
    lines += [
        "",
        f"Always guessing the commonest token has {100 * unigram:.1f} % accuracy.",
        "",
        "## The baseline at other lengths",
        "",
    ]
    lines += ["| full runs | seed | loss |", "|---|---|---|"]
    curve = sorted((f.length, f.seed, f.loss) for f in results if f.arm == BASELINE and f.rate == best.get(BASELINE))
    lines += [f"| {length:g} | {seed} | {loss:.3f} |" for length, seed, loss in curve]
    lines += ["", f"## Every rate that was tried, seed {seeds[0]}", "", "| switch | peak rate: loss |", "|---|---|"]
    for arm in chosen:
        tried = sorted((f.rate, f.loss) for f in results if (f.arm, f.seed, f.length) == (arm.name, seeds[0], 1.0))
        lines.append(f"| {arm.name} | " + ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tried) + " |")
    text = "\n".join([*lines, ""])
    print(text)
    stem = folder / f"{facts.date}-{name}"
    stem.with_suffix(".md").write_text(text)
    record = {"facts": facts.to_json(), "size": vars(size), "runs": [vars(f) for f in results], "summary": rows}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", nargs="+", help="files as `dstrain shards build --input` takes them; default: the embedded novels"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs; found again")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these, besides the baseline")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2000)
    parser.add_argument("--row-length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--held-out-rows", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--widen", type=int, default=2, help="further rates when the best is the first or last of those tried"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--name", default="learning")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    corpus = args.corpus or [str(files("dstrain") / "corpora" / "austen.jsonl.gz")]
    facts = Facts.now(__file__, packages=PACKAGES, inputs=corpus)
    size = Size(args.hidden, args.layers, args.vocab, args.row_length, args.rows, args.steps, args.held_out_rows)
    known = arms(size)
    names = {arm.name for arm in known}
    if unknown := set(args.arms or ()) - names:
        parser.error(f"--arms {sorted(unknown)}: there are {sorted(names)}")
    chosen = [arm for arm in known if args.arms is None or arm.name in {BASELINE, *args.arms}]
    prepare(corpus, args.work.resolve(), args.vocab)
    bench = Bench(args.work.resolve(), size, seconds=args.seconds, results=[])
    best = measure(bench, chosen, seeds=args.seeds, widen=args.widen)
    args.results.mkdir(parents=True, exist_ok=True)
    report(facts, size, bench.results, chosen, best, args.name, args.results)


if __name__ == "__main__":
    main()
