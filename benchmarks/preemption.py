"""Stop real two-rank runs in every phase, by any signal to any process, and see what is lost: the table of the preemption drill.

    python benchmarks/preemption.py --trials 60 --out benchmarks/results/2026-11-27-preemption.md

One run folder is stopped and started again ten times, once in every phase, with a random signal to one random rank or to all
processes of it; then it completes, and its bytes are compared with those of a run that nobody stopped. What a trial promises
is checked by `tests/support/preemption.py`. The bound is Clopper and Pearson's, one-sided, at 95 %: with no failure in n
trials about 3/n.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from header import ROOT, Facts
from soak import upper_bound

sys.path.insert(0, str(ROOT))  # started by path: the folder of the repository is not on the path yet

from tests.support.preemption import PHASES, Drill, preemptions


def table(drill: Drill) -> str:
    """One line a phase."""
    lines = [
        "| phase | trials | signals | to all processes of a rank | seconds to the end: median (most) | most steps after the request |",
        "|---|---|---|---|---|---|",
    ]
    for phase in (*PHASES, "import"):
        found = [record for record in drill.records if record.trial.phase == phase]
        if not found:
            continue
        signals = Counter(record.trial.signal.name for record in found)
        seconds = [record.stopped.seconds for record in found]
        shown = ", ".join(f"{name.removeprefix('SIG')} {signals[name]}" for name in sorted(signals))
        lines.append(
            f"| {phase} | {len(found)} | {shown} | {sum(r.trial.group for r in found)} "
            f"| {statistics.median(seconds):.1f} ({max(seconds):.1f}) | {max(r.stopped.steps_after for r in found)} |"
        )
    return "\n".join(lines)


def report(drill: Drill, facts: Facts, *, seconds: float) -> str:
    """The result file."""
    failed = drill.trials - len(drill.records)
    ends = len(drill.failures) - failed
    bound = upper_bound(failed, drill.trials)
    lines = [
        f"# Stopped in every phase, {facts.date}", "", facts.text(), "",
        f"{drill.trials} trials, seed {drill.seed}, in {drill.chains} chains of one stop in each of {len(PHASES) + 1} phases; "
        f"{drill.points} distinct combinations of phase, signal, rank and target; {seconds / 60:.0f} minutes.", "",
        f"- Saved by all ranks at one step, code 75, resumed: {len(drill.records)} of {drill.trials}. Failure rate at 95 %: "
        f"at most {100 * bound:.1f} %.",
        f"- Chains that ended with the bytes of the undisturbed run (weights, optimizer, loss and ledger of every step): "
        f"{drill.chains - ends} of {drill.chains}.",
        f"- Steps lost beyond the one in flight: {'0' if not failed else 'see the failures'}. A step counts as in flight when the "
        "signal came in it; one more is done in which the ranks agree, and it is saved, too.", "",
        table(drill), "",
        "Phases in which a store does not answer (data, start-up reads, evaluation reads) would last 300 seconds by themselves. The "
        "seconds of `import` hold the imports that were still to be done.",
    ]  # fmt: skip
    if drill.failures:
        lines += ["", "## Failures", "", *(f"```\n{failure}\n```" for failure in drill.failures)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Play and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = Facts.now(__file__, packages=("dstrain", "torch", "deepspeed"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dstrain-preemption-") as folder:
        drill = preemptions(Path(folder), args.trials, seed=args.seed, say=lambda line: print(line, flush=True))
    text = report(drill, facts, seconds=time.monotonic() - started)
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    return int(bool(drill.failures))


if __name__ == "__main__":
    sys.exit(main())
