"""The demo's final table. Every number is read from the runs' own files; one that is not there is a dash, never a guess."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError
from dstrain.base.storage import read_json, write_json, write_text
from dstrain.monitor.events import current_curve, read_events

Events = Sequence[Mapping[str, Any]]
Row = tuple[str, str, str]


def speeds(events: Events) -> dict[int, float]:
    """Real tokens per second of training by number of processes.

    Evaluation, saving and the first written point after each start (warm-up) are left out, unless there is no other.

    Args:
        events: of a run, in order.
    """
    first: dict[int, list[tuple[float, float]]] = {}
    later: dict[int, list[tuple[float, float]]] = {}
    world, is_first = 1, True
    for event in events:
        if event["event"] in ("started", "resumed"):
            world, is_first = int(event["world"]), True
        elif event["event"] == "step":
            seconds, steps = event["seconds"], event["window_steps"]
            tokens = event["tokens_per_second"] * seconds["total"] * steps
            trained_s = (seconds["total"] - seconds.get("save", 0.0) - seconds.get("evaluate", 0.0)) * steps
            (first if is_first else later).setdefault(world, []).append((tokens, trained_s))
            is_first = False
    result: dict[int, float] = {}
    for size, windows in (first | later).items():
        tokens, trained_s = (sum(column) for column in zip(*windows))
        result[size] = tokens / trained_s if trained_s > 0 else math.nan
    return result


def padding_percent(events: Events) -> float:
    """Token slots of all written steps that held no token, percent."""
    real = padded = 0.0
    for event in (e for e in events if e["event"] == "step"):
        tokens = event["tokens_per_second"] * event["seconds"]["total"] * event["window_steps"]
        real, padded = real + tokens, padded + tokens / (1 - event["padding_percent"] / 100)
    return 100 * (1 - real / padded) if padded else math.nan


def collect(folder: Path) -> dict[str, float]:
    """The demo's numbers, as far as its runs have them.

    Args:
        folder: of the demo.
    """
    events = current_curve(_events(folder / "pretrain"))
    found: dict[str, float] = {}
    for size, speed in speeds(events).items():
        found[f"tokens_per_second_{size}_processes" if size > 1 else "tokens_per_second_1_process"] = speed
    found["padding_percent"] = padding_percent(events)
    evaluated = [e for e in events if e["event"] == "evaluated"]
    if evaluated:
        before, after = evaluated[0]["metrics"], evaluated[-1]["metrics"]
        found |= {"loss_before": before["loss"], "loss_after": after["loss"]}
        found |= {"masked_accuracy": after["accuracy"], "unigram_accuracy": after["unigram_accuracy"]}
    resumes = [e for e in events if e["event"] == "resumed"]
    if resumes:
        found["resumed_at_step"] = float(resumes[-1]["step"])
    steps = [e for e in events if e["event"] == "step"]
    if steps:
        found |= {"pretraining_steps": float(steps[-1]["step"]), "pretraining_epochs": float(steps[-1]["epoch"])}
    for run, name in (("finetune", "finetuned_accuracy"), ("scratch", "scratch_accuracy")):
        results = _json(folder / run / "metrics.json").get("validation", {})
        if results:
            found |= {name: results["metrics"]["accuracy"], "majority_accuracy": results["baseline"]["accuracy"]}
            found["reviews_scored"] = float(results["examples"])
    return {name: float(value) for name, value in found.items() if math.isfinite(float(value))}


def rows(numbers: Mapping[str, float], *, precision: str) -> list[Row]:
    """What to show: (what, number, beside what).

    Args:
        numbers: of `collect`.
        precision: of the pretraining run.
    """

    def show(name: str, pattern: str) -> str:
        return pattern.format(numbers[name]) if name in numbers else "–"

    percent = "{:.1%}"
    two, one = "tokens_per_second_2_processes", "tokens_per_second_1_process"
    return [
        ("pretraining, 2 processes", show(two, "{:,.0f} tokens/s"), f"real tokens, {precision}, ZeRO-1"),
        ("pretraining, 1 process", show(one, "{:,.0f} tokens/s"), f"resumed at step {show('resumed_at_step', '{:.0f}')}"),
        ("padding", show("padding_percent", "{:.2f} %"), "token slots of the packed rows left empty"),
        ("held-out loss", show("loss_after", "{:.3f}"), f"{show('loss_before', '{:.3f}')} before training"),
        ("masked-token accuracy", show("masked_accuracy", percent), f"{show('unigram_accuracy', percent)} unigram baseline"),
        ("sentiment accuracy", show("finetuned_accuracy", percent), f"{show('majority_accuracy', percent)} majority class"),
        ("the same from scratch", show("scratch_accuracy", percent), "random weights, rate and dropout of its own"),
    ]  # fmt: skip


def verdict(numbers: Mapping[str, float]) -> list[str]:
    """What the two comparisons say, also where they say that nothing was gained."""
    lines: list[str] = []
    if "masked_accuracy" in numbers and "unigram_accuracy" in numbers:
        gain = 100 * (numbers["masked_accuracy"] - numbers["unigram_accuracy"])
        lines.append(
            f"Masked tokens: {gain:+.1f} points over always guessing the commonest token."
            if gain > 0
            else f"Masked tokens: no better than always guessing the commonest token ({gain:+.1f} points)."
        )
    if "finetuned_accuracy" in numbers and "scratch_accuracy" in numbers:
        gain = 100 * (numbers["finetuned_accuracy"] - numbers["scratch_accuracy"])
        share, count = numbers["scratch_accuracy"], max(1.0, numbers["reviews_scored"])
        error = 100 * math.sqrt(2 * share * (1 - share) / count)
        said = "Pretraining helped" if gain > 0 else "Pretraining did not beat training from scratch here"
        if 0 < gain <= error:
            said = "Pretraining helped a little, no more than chance may do"
        lines.append(
            f"{said}: {gain:+.1f} points on {count:.0f} held-out reviews (standard error of the difference {error:.1f})."
        )
    return lines


def report(folder: Path, *, spent: Mapping[str, Mapping[str, float]], quick: bool) -> str:
    """Write summary.md and summary.json, and return the text for the terminal.

    Args:
        folder: of the demo.
        spent: seconds and cpu_seconds of each step.
        quick: the runs were too short to learn anything.
    """
    numbers = collect(folder)
    environment = _json(folder / "pretrain" / "environment.json")
    table = rows(numbers, precision=environment.get("precision", "unknown precision"))
    seconds, cpu_s = (sum(step[key] for step in spent.values()) for key in ("seconds", "cpu_seconds"))
    notes = [
        *verdict(numbers),
        f"Took {seconds:.0f} s ({cpu_s:.0f} CPU-seconds) on {environment.get('cores')} cores of {environment.get('processor')}.",
        f"Runs: {', '.join(str(folder / name) for name in ('pretrain', 'finetune', 'scratch'))}",
        f"Hugging Face folder: {folder / 'pretrain' / 'export'}",
        f"Curves: tensorboard --logdir {shlex.quote(str(folder))}",
    ]
    if quick:
        notes.insert(0, "A quick run, too short to learn anything: the numbers only show that the way works.")
    write_text(folder / "summary.md", as_markdown(table, notes=notes))
    summary = {"numbers": numbers, "steps": spent, "quick": quick, "environment": environment}
    write_json(folder / "summary.json", summary)
    return "\n".join([as_text(table), "", *(f"  {note}" for note in notes)])


def as_text(table: Sequence[Row]) -> str:
    """The table for a terminal."""
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    return "\n".join(f"  {a:<{widths[0]}}   {b:>{widths[1]}}   {c}" for a, b, c in table)


def as_markdown(table: Sequence[Row], *, notes: Sequence[str]) -> str:
    """The table and what follows it as a Markdown page."""
    lines = ["# dstrain demo", "", "| what | number | beside it |", "|---|---:|---|"]
    lines += [f"| {a} | {b} | {c} |" for a, b, c in table]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _events(run_folder: Path) -> list[dict[str, Any]]:
    try:
        return read_events(run_folder / "events.jsonl")
    except DataError:
        return []


def _json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except DataError:
        return {}
    return data if isinstance(data, dict) else {}
