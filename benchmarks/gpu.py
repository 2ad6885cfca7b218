"""Training steps of encoders on one GPU: dstrain against the Hugging Face Trainer, eager and compiled, and a loop written by hand.

    python benchmarks/gpu.py                         # one GPU, offline, installs nothing, at most 9 minutes
    python benchmarks/gpu.py --tiny                  # the same on a CPU with tiny models, to see that it works

BERT-base and BERT-large at rows of 512, ModernBERT-base at rows of 1,024, bf16, on whole novels (rows are full, so nobody pads), 15 % masking (30 % for
ModernBERT). Each run is a process of its own. Runs stand in order of interest, and those for which no time is left are named as not measured.
MFU counts useful arithmetic over the device's dense bf16 peak; "of the roofline" is the time that measured matrix products,
attention and memory would need, over the time taken. A run that is out of memory is tried again with half the rows. Results go to
benchmarks/results/ after every run, so that what breaks one off leaves the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from header import ROOT, Facts
from step import PACKAGES, bert, measure
from step_peers import Job, prepare


@dataclass(frozen=True)
class Shape:
    """A model, its rows, and how dstrain and the others run it."""

    name: str
    model: dict[str, Any]
    kind: str
    row_length: int
    rows: int
    """Of a step."""
    mask_rate: float
    vocab: int


def shapes(*, tiny: bool) -> list[Shape]:
    """The three shapes, or the same families at a size for a CPU."""
    if tiny:
        small = {
            "model_type": "modernbert",
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 96,
        }
        return [
            Shape("BERT, tiny", bert(64, 2, 128), "huggingface", 128, 4, 0.15, 2000),
            Shape("ModernBERT, tiny", small, "dstrain-encoder", 256, 2, 0.3, 2000),
        ]  # fmt: skip
    modern = {
        "model_type": "modernbert", "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152,
    }  # fmt: skip
    return [
        Shape("BERT-base, 512", bert(768, 12, 512), "huggingface", 512, 96, 0.15, 30528),
        Shape("ModernBERT-base, 1,024", modern, "dstrain-encoder", 1024, 32, 0.3, 50368),
        Shape("BERT-large, 512", bert(1024, 24, 512), "huggingface", 512, 48, 0.15, 30528),
    ]


PEERS = ("dstrain", "hf-grouped", "hf-compile", "hand")
ORDER = [(0, "dstrain"), (1, "dstrain"), (2, "dstrain"), (0, "hf-grouped"), (0, "hf-compile"), (1, "hf-grouped"), (2, "hf-grouped"),
         (0, "hand"), (1, "hf-compile"), (2, "hf-compile"), (1, "hand"), (2, "hand")]  # fmt: skip


RESERVED_S = 60.0
"""For the ceilings and the report, at the end."""


@dataclass
class Rows:
    """What has been measured, and what has not and why."""

    found: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    ceilings: dict[int, tuple[float, float, str]] = field(default_factory=dict)
    """(useful FLOP of the timed steps over the peak, seconds that the measured ceilings need for them, what was measured)."""
    missing: list[str] = field(default_factory=list)


def ceiling(shape: Shape, folder: str, *, device: str, found: dict[str, Any]) -> tuple[float, float, str]:
    """As `Rows.ceilings` keeps them, for what dstrain was fed."""
    import step_peers

    from dstrain.models.huggingface import anatomy_without_weights
    from dstrain.planner.bench import CEILING, ceilings, describe_ceilings, useful_flops
    from dstrain.planner.calibration import calibrated_device, device_of
    from dstrain.planner.devices import find_device
    from dstrain.planner.steptime import micro_batch_seconds
    from dstrain.train.footprint import Batch

    job = Job(
        peer="dstrain", folder=folder, out="", model=shape.model, row_length=shape.row_length, rows=shape.rows, warmup=1, steps=1,
        mask_rate=shape.mask_rate, kind=shape.kind, model_vocab=shape.vocab, device=device,
    )  # fmt: skip
    config = step_peers.dstrain_config(job, 1)
    anatomy = anatomy_without_weights(config.model, vocab_size=shape.vocab)
    precision = "bf16" if device == "cuda" else "fp32"
    measured = ceilings(anatomy, sequence_length=shape.row_length, device=device, precision=precision)  # type: ignore[arg-type]
    limit = calibrated_device(find_device(device_of(measured)), measured)
    tokens = found["tokens"]
    batch = Batch(
        tokens=tokens, scored=round(tokens * shape.mask_rate), context=min(found["mean_context"], shape.row_length)
    )
    seconds = sum(micro_batch_seconds(anatomy, batch, limit, precision=precision, stack=CEILING))
    return useful_flops(anatomy, batch) / limit.peak_flops, seconds, describe_ceilings(limit, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not done by then is killed (default 9)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--name", default="gpu")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    chosen = shapes(tiny=args.tiny)
    facts = Facts.now(__file__, packages=(*PACKAGES, "flash-attn"))
    rows = Rows()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), min(shape.vocab for shape in chosen), paragraphs=False)
        measure_all(
            args, chosen, rows, folder=folder, end=end - RESERVED_S, write=lambda: write(args, facts, chosen, rows)
        )
        for number, shape in enumerate(chosen):
            ours = rows.found.get((number, "dstrain"))
            if ours is None or time.monotonic() > end - RESERVED_S / 4:
                continue
            try:
                rows.ceilings[number] = ceiling(shape, folder, device=device_of_run(args), found=ours)
            except Exception as error:  # noqa: BLE001  (the rows are worth more than what they are compared with)
                rows.missing.append(f"{shape.name}: ceilings failed: {_last_line(error)}")
    print(write(args, facts, chosen, rows))


def device_of_run(args: argparse.Namespace) -> str:
    return "cpu" if args.tiny else "cuda"


def measure_all(
    args: argparse.Namespace, chosen: list[Shape], rows: Rows, *, folder: str, end: float, write: Callable[[], object]
) -> None:  # fmt: skip
    """Every run for which there is time, in order of interest; what is there is written after each."""
    longest = 20.0
    for number, peer in ORDER:
        if number >= len(chosen) or peer not in args.peers:
            continue
        shape = chosen[number]
        while (number, peer) not in rows.found:
            started = time.monotonic()
            if started + 1.3 * longest > end:
                rows.missing.append(f"{shape.name}: {peer} (no time left)")
                break
            try:
                rows.found[number, peer] = {
                    **measure(job_of(args, shape, number, peer, folder), 1, limit_s=end - started), "rows": shape.rows,
                }  # fmt: skip
            except (Exception, SystemExit) as failed:  # noqa: BLE001  (one run must not take the others with it)
                if shape.rows > 1 and any(sign in str(failed) for sign in ("out of memory", "does not fit the memory")):
                    shape = dataclasses.replace(shape, rows=shape.rows // 2)
                    continue
                rows.missing.append(f"{shape.name}: {peer} failed: {_last_line(failed)}")
                break
            longest = max(longest, time.monotonic() - started)
            found = rows.found[number, peer]
            print(f"{shape.name}: {peer} {found['tokens'] / found['wall_s']:,.0f} tokens/s", flush=True)
        write()


def job_of(args: argparse.Namespace, shape: Shape, number: int, peer: str, folder: str) -> Job:
    """One run."""
    return Job(
        peer=peer, folder=folder, out=f"{folder}/{number}-{peer}", model=shape.model, row_length=shape.row_length, rows=shape.rows,
        warmup=args.warmup, steps=args.steps, mask_rate=shape.mask_rate, model_vocab=shape.vocab, device=device_of_run(args),
        kind=shape.kind if peer in ("dstrain", "hand") else "huggingface", precision="fp32" if args.tiny else "bf16",
        threads=1 if args.tiny else 8, options={"engine": {"zero_stage": 0}} if peer == "hand" else {},
    )  # fmt: skip


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def write(args: argparse.Namespace, facts: Facts, chosen: list[Shape], rows: Rows) -> str:
    """Both files, of what there is so far; the text."""
    text = report(args, facts, chosen, rows)
    stem = ROOT / "benchmarks" / "results" / f"{facts.date}-{args.name}"
    stem.with_suffix(".md").write_text(text)
    data = {
        "facts": facts.to_json(),
        "results": {f"{chosen[n].name}: {p}": found for (n, p), found in rows.found.items()},
    }
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    return text


def report(args: argparse.Namespace, facts: Facts, chosen: list[Shape], rows: Rows) -> str:
    """All shapes, each with its ceilings."""
    from dstrain.base.device import device_name

    device = device_of_run(args)
    lines = [f"# Encoders on one device, {facts.date}", "", facts.text(), "", f"{device_name(device)}; {args.steps} timed steps after {args.warmup}.", ""]  # fmt: skip
    for number, shape in enumerate(chosen):
        peers = [peer for peer in PEERS if (number, peer) in rows.found]
        if not peers:
            continue
        measured = rows.ceilings[number][2] if number in rows.ceilings else "Ceilings were not measured."
        lines += [
            f"## {shape.name}, {shape.mask_rate:.0%} masking", "", measured, "",
            "| peer | rows a step | useful tokens/s | dstrain is faster by | MFU (useful) | of the roofline | memory, GB | waiting for data | loss, first → last |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        ours = rows.found.get((number, "dstrain"))
        lines += [_line(peer, rows.found[number, peer], ours, rows.ceilings.get(number)) for peer in peers]
        notes = ours.get("notes", []) if ours else []
        lines += ["", *(f"dstrain: {note}." for note in notes if "attention" in note or "block" in note), ""]
    lines += [*(f"Not measured: {what}." for what in rows.missing), ""]
    return "\n".join(lines)


def _line(
    peer: str, found: dict[str, Any], ours: dict[str, Any] | None, ceiling: tuple[float, float, str] | None
) -> str:
    """A row of a table; empty where there is nothing to compare with."""
    speed = found["tokens"] / found["wall_s"]
    faster = f"{ours['tokens'] / ours['wall_s'] / speed:.2f}×" if ours else ""
    mfu = roofline = ""
    if ours and ceiling:
        share = found["tokens"] / ours["tokens"] / found["wall_s"]
        mfu, roofline = f"{ceiling[0] * share:.1%}", f"{ceiling[1] * share:.0%}"
    waited = f"{found['data_wait_s'] / found['wall_s']:.2%}" if "data_wait_s" in found else ""
    return (
        f"| {peer} | {found['rows']} | {speed:,.0f} | {faster} | {mfu} | {roofline} | {found['peak_bytes'] / 1e9:.1f} | {waited} | "
        f"{found['losses'][0]:.2f} → {found['losses'][-1]:.2f} |"
    )


if __name__ == "__main__":
    main()
