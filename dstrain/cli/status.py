"""`dstrain status` and `dstrain runs`: what runs are doing, from their folders alone. Prints; starts and changes nothing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ConfigError, DstrainError

if TYPE_CHECKING:
    from dstrain.stages.run_status import RunStatus

_STATUS_EPILOG = """
examples:
  dstrain status runs/bert-base                 once
  dstrain status runs/bert-base --watch         again every 5 seconds, until Ctrl-C or the run has ended
  dstrain status runs/bert-base --json | jq .step

Only the run folder is read, so this works on any host that sees it, and on a run that has ended. `silent` means that for a
minute nothing in the folder has moved: the job was killed, or hangs with its file system.
"""
_RUNS_EPILOG = """
examples:
  dstrain runs runs/                            every run below runs/, newest sign of life first
  dstrain runs runs/ --sort loss                the lowest held-out loss first

The loss is that of held-out data where there is one, else of the last step.
"""
_SORTS = ("changed", "name", "loss", "step")
_CLEAR = "\x1b[H\x1b[J"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `status` and `runs`."""
    status = subparsers.add_parser(
        "status", help="what a run is doing", epilog=_STATUS_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Step, loss, speed, time left, goodput, newest checkpoint, ranks, and what the run waits for.",
    )  # fmt: skip
    status.add_argument("run_folder", type=Path, help="the run folder")
    status.add_argument(
        "--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="look again and again (default 5)"
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_run_status)
    runs = subparsers.add_parser(
        "runs", help="list and compare runs", epilog=_RUNS_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="One line for every run below a folder.",
    )  # fmt: skip
    runs.add_argument("folder", type=Path, help="where to look, three levels deep")
    runs.add_argument("--sort", choices=_SORTS, default="changed", help="order of the lines (default changed)")
    runs.add_argument("--json", action="store_true", help="print JSON")
    runs.set_defaults(run=_run_runs)


def _run_status(args: argparse.Namespace) -> int:
    from dstrain.stages.run_status import read_status

    if args.watch is not None and args.watch <= 0:
        raise ConfigError(f"--watch: {args.watch:g} is not a number of seconds: give more than 0")
    while True:
        status = read_status(args.run_folder)
        text = json.dumps(status.to_plain()) if args.json else shown(status)
        clear = _CLEAR if args.watch is not None and not args.json and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if args.watch is None or status.state not in ("running", "silent"):
            return 0
        time.sleep(args.watch)


def _run_runs(args: argparse.Namespace) -> int:
    from dstrain.stages.run_status import find_runs, read_status

    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder}: no such folder")
    found = []
    for path in find_runs(args.folder):
        try:
            found.append(read_status(path))
        except DstrainError as error:  # removed meanwhile
            print(f"dstrain: {error}", file=sys.stderr)
    if not found:
        raise ConfigError(
            f"{args.folder}: no run here, nor three levels below (a run folder has config.yaml and events.jsonl)"
        )
    found.sort(key=_sort_key(args.sort))
    print(json.dumps([status.to_plain() for status in found]) if args.json else table(found, args.folder))
    return 0


def shown(status: RunStatus) -> str:
    """A run on some lines."""
    from dstrain.stages.run_status import duration

    n = status.numbers
    lines = [
        f"{status.folder}: {status.stage} {status.model}".rstrip()
        + f", {status.state}"
        + (f" ({status.why})" if status.why else "")
    ]
    whole = f" of {status.max_steps:,} ({100 * status.step / status.max_steps:.1f} %)" if status.max_steps else ""
    eta = f", {duration(status.eta_s)} left" if status.eta_s is not None and status.state == "running" else ""
    lines.append(_line("step", f"{status.step:,}{whole}{eta}"))
    learning = [
        _named(n, "loss", ".4f"),
        _named(n, "accuracy", ".1%"),
        _named(n, "learning_rate", ".2e"),
        _named(n, "gradient_norm", ".2f"),
    ]
    lines.append(_line("training", ", ".join(filter(None, learning))))
    scores = [_named(status.evaluated, name, ".4g") for name in status.evaluated if name not in ("step", "seconds")]
    lines.append(
        _line(
            "held-out", ", ".join(filter(None, scores)) + f", at step {status.evaluated.get('step')}" if scores else ""
        )
    )
    speed = [
        _count(n.get("tokens_per_second"), "tokens/s"),
        _named(n, "mfu", ".1%"),
        _padding(n),
        _count(n.get("tokens"), "tokens in all"),
        _money(n),
    ]
    lines.append(_line("speed", ", ".join(filter(None, speed))))
    saved = status.saved
    if saved is not None:
        read_back = "read back" if saved.read_back else "not read back"
        lines.append(_line("saved", f"step {saved.step:,}, {duration(saved.age_s)} ago, {read_back}"))
    else:
        lines.append(_line("saved", "nothing yet"))
    lines.append(_line("goodput", _goodput(status.goodput)))
    lines.append(_line("ranks", _ranks(status)))
    lines.append(_line("waits for", status.waits_for))
    if status.restarts or status.last_failure:
        lines.append(
            _line(
                "restarts",
                f"{status.restarts}" + (f", last failure: {status.last_failure}" if status.last_failure else ""),
            )
        )
    return "\n".join(filter(None, lines))


def table(found: Sequence[RunStatus], folder: Path) -> str:
    """One line a run."""
    from dstrain.stages.run_status import duration

    now = time.time()
    rows = [("run", "stage", "state", "step", "loss", "tokens/s", "goodput", "last sign")]
    for status in found:
        name = str(Path(status.folder).relative_to(folder)) if Path(status.folder) != folder else folder.name
        steps = f"{status.step:,}" + (f"/{status.max_steps:,}" if status.max_steps else "")
        loss = _loss(status)
        ratio = status.goodput.get("ratio")
        rows.append((
            name, status.stage, status.state, steps, "" if loss is None else f"{loss:.4f}",
            _count(status.numbers.get("tokens_per_second"), ""), "" if ratio is None else f"{100 * ratio:.0f} %",
            f"{duration(max(0.0, now - status.changed_at))} ago" if status.changed_at else "",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _sort_key(name: str) -> Any:
    def key(status: RunStatus) -> tuple[Any, ...]:
        loss = _loss(status)
        first = {
            "changed": -status.changed_at,
            "name": 0,
            "loss": float("inf") if loss is None else loss,
            "step": -status.step,
        }[name]
        return first, status.folder

    return key


def _loss(status: RunStatus) -> float | None:
    for numbers in (status.evaluated, status.numbers):
        if isinstance(loss := numbers.get("loss"), (int, float)):
            return float(loss)
    return None


def _line(name: str, text: str) -> str:
    return f"  {name:<10} {text}" if text else ""


def _named(numbers: Any, name: str, form: str) -> str:
    value = numbers.get(name)
    shown_name = {"mfu": "MFU"}.get(name, name.replace("_", " "))
    if isinstance(value, str):  # nan, inf
        return f"{shown_name} {value}"
    return f"{shown_name} {value:{form}}" if isinstance(value, (int, float)) else ""


def _count(value: Any, unit: str) -> str:
    """1,234, 12.3k, 4.56 M tokens."""
    if not isinstance(value, (int, float)):
        return ""
    for size, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):.3g}{sign} {unit}".rstrip()
    return f"{value:,.0f} {unit}".rstrip()


def _padding(numbers: Any) -> str:
    value = numbers.get("padding_percent")
    return f"padding {value:.1f} %" if isinstance(value, (int, float)) else ""


def _money(numbers: Any) -> str:
    value = numbers.get("cost_usd")
    return f"${value:,.2f}" if isinstance(value, (int, float)) else ""


def _goodput(goodput: Any) -> str:
    from dstrain.monitor.goodput import BUCKETS
    from dstrain.stages.run_status import duration

    if not goodput or not goodput["wall"]:
        return ""
    shares = {bucket: goodput[bucket] / goodput["wall"] for bucket in BUCKETS if bucket != "productive"}
    most = sorted((b for b in shares if shares[b] >= 0.005), key=lambda b: -shares[b])[:4]
    rest = "; " + ", ".join(f"{b.replace('_', ' ')} {shares[b]:.0%}" for b in most) if most else ""
    attempts = f" in {goodput['attempts']} attempts" if goodput["attempts"] > 1 else ""
    return f"{goodput['ratio']:.1%} of {duration(goodput['wall'])}{attempts}{rest}"


def _ranks(status: RunStatus) -> str:
    if not status.ranks:
        return ""
    hosts = Counter(rank.host for rank in status.ranks)
    where = ", ".join(f"{host}: {count}" for host, count in list(hosts.items())[:8]) + (
        ", ..." if len(hosts) > 8 else ""
    )
    phases = Counter(rank.phase.replace("_", " ") for rank in status.ranks)
    doing = (
        ", ".join(f"{count} in {phase}" for phase, count in phases.most_common()) if status.state == "running" else ""
    )
    return f"{len(status.ranks)} on {len(hosts)} host{'s' if len(hosts) > 1 else ''} ({where})" + (
        f": {doing}" if doing else ""
    )
