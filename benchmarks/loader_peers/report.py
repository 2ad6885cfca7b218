"""The result page of `benchmarks/loader.py`: hardware, tables, targets met and missed."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from variants import OURS, VARIANTS

Data = dict[str, Any]
UNITS = {
    "blocks": "Whole blocks and documents as arrays",
    "documents": "Whole blocks and documents as arrays",
    "rows": "Rows of 512 tokens",
    "train": "Ready to train: packed or grouped rows, masked, collated",
}


def render(data: Data) -> str:
    """The page as Markdown."""
    parts = [_head(data), _targets(data), *_speed_tables(data), _counts(data), _sizes(data), _absent(data)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(data: Data) -> str:
    peers = "; ".join(
        f"{peer}: " + ", ".join(f"{n} {v}" for n, v in found.items()) for peer, found in data["versions"].items()
    )
    return f"""# dstrain's loader against its peers, {data["head"]["date"]}

{data["head_text"]}
Each peer's environment: {peers}. Load average {os.getloadavg()[0]:.1f} at the end.
{data["mtok"]:g} Mtok of uint16 tokens; {data["rounds"]} interleaved rounds of {data["seconds"]:g} s a stretch, one fresh process a figure; median (least to greatest).
CPU time is user + system of the whole process tree; one process and one thread unless workers are named. Local files; the first
batch and the resume begin with the files' pages dropped from the page cache, the timed stretch runs from it. Imports are outside.
How each peer is set up stands in `benchmarks/loader_peers/peer_*.py`."""


def _speeds(data: Data, name: str) -> list[float]:
    """Mtok per CPU-second, by round."""
    return [r["tokens"] / 1e6 / max(r["cpu_s"], 1e-3) for r in _runs(data, name, "speed")]


def _runs(data: Data, name: str, kind: str) -> list[Data]:
    return data["results"].get(name, {}).get(kind, [])


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median of the ratios taken round by round."""
    pairs = [a / b for a, b in zip(ours, theirs) if b]
    return statistics.median(pairs) if pairs else None


def _spread(values: Sequence[float], *, unit: str = "") -> str:
    if not values:
        return "failed"
    return f"{_number(statistics.median(values))}{unit} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed_tables(data: Data) -> list[str]:
    tables = []
    for title in dict.fromkeys(UNITS.values()):
        names = [n for n in data["results"] if UNITS[VARIANTS[n].delivers] == title]
        if names:
            head = (
                "| | Mtok per CPU-s | dstrain is | Mtok per s | first batch, cold, s | resumed at half, s | memory, MiB | peak, MiB |\n"
                "|---|---|---|---|---|---|---|---|"
            )
            tables.append("\n".join([f"## {title}\n", head, *(_speed_row(data, name) for name in names)]))
    return tables


def _speed_row(data: Data, name: str) -> str:
    runs = _runs(data, name, "speed")
    resumed = [r["first_s"] for r in _runs(data, name, "resume")]
    ratio = _ratio(_speeds(data, OURS[VARIANTS[name].delivers]), _speeds(data, name))
    wall = _spread([r["tokens"] / 1e6 / r["wall_s"] for r in runs])
    cells = [
        name,
        _spread(_speeds(data, name)),
        f"{_number(ratio)}×" if ratio else "",
        wall,
        _spread([r["first_s"] for r in runs]),
        _spread(resumed) if VARIANTS[name].resumes else "",
        _spread([r["pss_mib"] for r in runs]),
        _spread([r["peak_mib"] for r in runs]),
    ]
    return "| " + " | ".join(cells) + " |"


def _counts(data: Data) -> str:
    names = [name for name, found in data["results"].items() if found.get("count")]
    lines = [
        "## Lost and repeated rows of one epoch\n",
        "9,600 numbered rows, global batch 96, 2 ranks stop at step 47 of 100; lost / repeated, counted by number. The numbers",
        "divide evenly and the global batch is kept, which is what suits the peers best. Where a state belongs to its rank, three ranks skip what was seen.\n",
        "| | uninterrupted | resumed by 2 ranks | resumed by 3 ranks |",
        "|---|---|---|---|",
    ]
    for name in names:
        found = data["results"][name]["count"]
        cells = ["failed" if c is None else f"{c['lost']:,} / {c['repeated']:,}" for c in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if names else ""


def _sizes(data: Data) -> str:
    rows = [(peer, c["bytes"] / c["tokens"]) for peer, c in data["conversions"].items() if c]
    lines = ["## Bytes per token on disk\n", "| format | bytes per token |", "|---|---|"]
    return "\n".join(lines + [f"| {peer} | {size:.2f} |" for peer, size in rows])


def _absent(data: Data) -> str:
    lines = [f"- {peer}: not installed or not usable ({why})" for peer, why in data["missing"].items()]
    lines += [f"- {name} failed: {why}" for name, why in data["failures"].items()]
    return "\n".join(["## Not measured\n", *lines]) if lines else ""


# --- targets -------------------------------------------------------------------------------------------------------


def _targets(data: Data) -> str:
    lines = ["## Targets\n", "| target | measured | |", "|---|---|---|"]
    for text, value, shown, is_met in _judged(data):
        verdict = "not measured" if value is None else "met" if is_met(value) else "**missed**"
        lines.append(f"| {text} | {'' if value is None else shown(value)} | {verdict} |")
    return "\n".join(lines)


Judged = tuple[str, float | None, Callable[[float], str], Callable[[float], bool]]


def _judged(data: Data) -> list[Judged]:
    def faster(text: str, ours: str, theirs: str, factor: float) -> Judged:
        ratio = _ratio(_speeds(data, ours), _speeds(data, theirs))
        return (f"{text}: ≥ {factor:g}×", ratio, lambda v: f"{_number(v)}×", lambda v: v >= factor)

    return [
        faster("webdataset on the same block shards, blocks", "dstrain blocks", "webdataset, same blocks", 3),
        faster("webdataset on per-document tars, blocks", "dstrain blocks", "webdataset, document .npy", 60),
        faster(
            "webdataset on per-document tars, packed rows in plan order",
            "dstrain rows",
            "webdataset, document .npy",
            60,
        ),
        faster("LitData, rows", "dstrain rows", "LitData TokensLoader", 3),
        faster("HF run_mlm, ready to train", "dstrain train", "HF run_mlm", 20),
        *_resume_targets(data),
        *_loss_targets(data),
        _memory_target(data),
        _size_target(data),
    ]


def _resume_targets(data: Data) -> list[Judged]:
    resumed = [r["first_s"] for r in _runs(data, "dstrain train", "resume")]
    cold = [r["first_s"] for r in _runs(data, "dstrain train", "speed")]
    value = statistics.median(resumed) if resumed else None
    return [
        ("resume at half of the data: ≤ 0.3 s", value, lambda v: f"{v:.3f} s", lambda v: v <= 0.3),
        ("resume against own cold start: ≤ 1.2×", _ratio(resumed, cold), lambda v: f"{v:.2f}×", lambda v: v <= 1.2),
    ]


def _loss_targets(data: Data) -> list[Judged]:
    counted = (data["results"].get("dstrain rows") or {}).get("count") or {}
    found = [counted.get(key) for key in ("to_2", "to_3")]
    judged: list[Judged] = []
    for kind in ("lost", "repeated"):
        value = None if None in found else sum(c[kind] for c in found if c)
        judged.append((f"{kind} rows, resume and change of world: 0", value, lambda v: f"{v:,}", lambda v: v == 0))
    return judged


def _memory_target(data: Data) -> Judged:
    ours, theirs = (
        [r["pss_mib"] for r in _runs(data, name, "speed")]
        for name in ("dstrain train, prefetch thread", "WebLoader, document .npy, shuffle, 4 workers")
    )
    return (
        "memory of a rank against WebLoader with 4 workers: ≤ 0.5×", _ratio(ours, theirs), lambda v: f"{v:.2f}×", lambda v: v <= 0.5,
    )  # fmt: skip


def _size_target(data: Data) -> Judged:
    sizes = {peer: c["bytes"] / c["tokens"] for peer, c in data["conversions"].items() if c}
    value = sizes["dstrain"] / sizes["webdataset"] if {"dstrain", "webdataset"} <= sizes.keys() else None
    return ("bytes on disk against per-document .npy tars: ≤ 0.65×", value, lambda v: f"{v:.2f}×", lambda v: v <= 0.65)
