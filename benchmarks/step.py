"""Useful tokens per CPU-second of a training step, against the Hugging Face Trainer and a loop written by hand.

    python benchmarks/step.py                                         # 1 and 2 processes, 15 and 30 % masking, about 40 minutes
    python benchmarks/step.py --rounds 1 --steps 6 --processes 1 --mask-rates 0.15

Documents are the paragraphs of the embedded Austen corpus; the peers are described in benchmarks/step_peers.py. Each runs in processes
of its own, in turn, round after round, in alternating order. A useful token is a real one: padding does not count. The clock runs from the
end of the warm-up to the end of the last step; start-up, tokenising and saving are outside for everyone. Speed is tokens of all
processes over CPU-seconds of all processes, which neighbours on the machine disturb least; wall-clock speed stands beside it.
Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from header import ROOT, Facts
from step_peers import Job, prepare

PEERS = ("dstrain", "hand", "hf-grouped", "hf-padded", "hf-deepspeed")
PACKAGES = ("dstrain", "torch", "deepspeed", "transformers", "accelerate")
HERE = Path(__file__).resolve().parent


def bert(hidden: int, layers: int, positions: int) -> dict[str, Any]:
    """A BERT of some size, without dropout."""
    return {
        "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": 4 * hidden, "max_position_embeddings": positions, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def measure(
    job: Job, processes: int, *, script: Path = HERE / "step_peers.py", limit_s: float | None = None
) -> dict[str, Any]:
    """One run in processes of its own; tokens and CPU-seconds of all, wall-clock seconds and losses of rank 0.

    Raises:
        SystemExit: a process failed, with the end of what it said; or it was not done within the limit, and was killed.
    """
    path = Path(f"{job.out}.json")
    path.write_text(json.dumps(asdict(job)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        if job.device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        elif processes == 1:  # of several GPUs the Trainer would take all
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if processes > 1 or job.peer in ("dstrain", "hand", "hf-deepspeed"):
            environment |= {
                "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, str(script), str(path)]
        running.append(subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ))  # fmt: skip
    errors = _ended(running, limit_s)
    if any(process.returncode for process in running):
        raise SystemExit(f"{job.peer} failed:\n" + "\n".join(text[-3000:] for text in errors))
    parts = [json.loads(Path(f"{job.out}.{rank}").read_text()) for rank in range(processes)]
    return {
        **parts[0], "tokens": sum(p["tokens"] for p in parts), "cpu_s": sum(p["cpu_s"] for p in parts),
        "losses": [statistics.fmean(p["losses"][n] for p in parts) for n in range(len(parts[0]["losses"]))],
    }  # fmt: skip


def _ended(running: list[subprocess.Popen[bytes]], limit_s: float | None) -> list[str]:
    """What each process said on stderr; all are killed, with what they started, when one takes too long or the wait is broken off."""
    end = None if limit_s is None else time.monotonic() + limit_s
    try:
        return [
            process.communicate(timeout=None if end is None else max(0.0, end - time.monotonic()))[1].decode(
                errors="replace"
            )
            for process in running
        ]
    except subprocess.TimeoutExpired:
        raise SystemExit(f"killed after {limit_s:.0f} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One setting's peers, each with its ratio to dstrain, round by round."""
    lines = [
        "| peer | useful tokens per CPU-second | useful tokens/s | dstrain is faster by (CPU-seconds) | loss, first → last |",
        "|---|---|---|---|---|",
    ]
    ours = [r["tokens"] / r["cpu_s"] for r in results["dstrain"]]
    for peer, runs in results.items():
        speed = [r["tokens"] / r["cpu_s"] for r in runs]
        wall = statistics.median(r["tokens"] / r["wall_s"] for r in runs)
        ratios = [a / b for a, b in zip(ours, speed)]
        ratio = (
            "1" if peer == "dstrain" else f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        first, last = runs[-1]["losses"][0], statistics.fmean(runs[-1]["losses"][-4:])
        lines.append(
            f"| {peer} | {statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f}) | {wall:,.0f} | {ratio} | "
            f"{first:.2f} → {last:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help="rows of one process and step")
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8000, help="of the tokenizer")
    parser.add_argument("--model-vocab", type=int, default=30522, help="rows of the embedding")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--zero-stage", type=int, default=0, choices=(0, 1, 2, 3), help="of dstrain; 0 costs least where all fits"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mask-rates", type=float, nargs="+", default=[0.15, 0.30])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--name", default="step", help="of the result files")
    args = parser.parse_args()
    facts = Facts.now(__file__, packages=PACKAGES)
    peers = ["dstrain", *(peer for peer in args.peers if peer != "dstrain")]
    settings = [(processes, rate) for rate in args.mask_rates for processes in args.processes]
    results: dict[tuple[int, float], dict[str, list[dict[str, Any]]]] = {s: {p: [] for p in peers} for s in settings}
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary), args.vocab)
        for round_ in range(args.rounds):
            for processes, rate in settings:
                for peer in peers if round_ % 2 == 0 else peers[::-1]:
                    job = Job(
                        peer=peer, folder=temporary, out=f"{temporary}/{peer}", model=bert(args.hidden, args.layers, args.row_length),
                        row_length=args.row_length, rows=args.rows, warmup=args.warmup, steps=args.steps, mask_rate=rate,
                        model_vocab=args.model_vocab, precision=args.precision, threads=args.threads,
                        options={"engine": {"zero_stage": args.zero_stage}},
                    )  # fmt: skip
                    found = measure(job, processes)
                    results[processes, rate][peer].append(found)
                    speed = found["tokens"] / found["cpu_s"]
                    print(
                        f"round {round_ + 1}, {processes} process(es), {rate:.0%}: {peer} {speed:,.0f} tokens per CPU-second",
                        flush=True,
                    )
    lines = [
        f"# A training step against its peers, {facts.date}", "", facts.text(), "",
        f"BERT, hidden {args.hidden}, {args.layers} layers, vocabulary {args.model_vocab}, rows of {args.row_length}, {args.rows} rows a "
        f"process and step, {args.threads} thread(s) a process, {args.precision}, fused AdamW, ZeRO-{args.zero_stage} for dstrain, ZeRO-1 for hf-deepspeed. {args.steps} timed steps "
        f"after {args.warmup}, {args.rounds} rounds in turn; median (smallest to largest), ratios round by round.", "",
    ]  # fmt: skip
    for (processes, rate), found in results.items():
        lines += [f"## {processes} process{'es' if processes > 1 else ''}, {rate:.0%} masking", "", *table(found), ""]
    lines += [
        "A useful token is a real one; padding does not count. hf-grouped and hf-deepspeed cut documents and let them attend to each "
        "other; dstrain, hand and hf-padded do neither. hand is dstrain's model, kernels and batches in a loop of twenty lines.", "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    stem = ROOT / "benchmarks" / "results" / f"{facts.date}-{args.name}"
    stem.with_suffix(".md").write_text(text)
    data = {"facts": facts.to_json(), "results": {f"{p} processes, {r}": found for (p, r), found in results.items()}}
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
