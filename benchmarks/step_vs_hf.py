"""Useful tokens per second of dstrain against the Hugging Face Trainer: same model, data, mask rate, precision, optimizer.

    python benchmarks/step_vs_hf.py                     # 1 and 2 processes, five interleaved rounds, about 15 minutes
    python benchmarks/step_vs_hf.py --rounds 1 --steps 8 --processes 1

Documents are the paragraphs of the embedded Austen corpus. The peers, each in processes of its own, in turn, round after round:

  dstrain     packed whole documents, unpadded attention, head on masked positions, through the real engine and loader
  hf-grouped  transformers.Trainer on text concatenated and cut into full rows (run_mlm.py's group_texts): no padding, but
              documents are cut and attend to each other
  hf-padded   transformers.Trainer on one document per row, padded to the longest of the batch, as most users run it

A useful token is a real one: padding does not count. The clock runs from the end of the warm-up steps to the end of the
last step, on rank 0; start-up, tokenising and saving are outside for everyone. Everybody uses fused torch AdamW, 15 %
masking, no dropout, no evaluation, no logging inside the clock. Results go to benchmarks/results/ as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

PEERS = ("dstrain", "hf-grouped", "hf-padded")
ROOT = Path(__file__).resolve().parents[1]
SEED, SEQUENCE_LENGTH, MASK_RATE, LEARNING_RATE = 1, 128, 0.15, 5e-4


def model_fields(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "bert", "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": max(1, args.hidden // 64), "intermediate_size": 4 * args.hidden,
        "max_position_embeddings": SEQUENCE_LENGTH, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def prepare(folder: Path, vocab_size: int) -> None:
    """Paragraphs, tokenizer and shards, made once for all peers."""
    from dstrain.corpus.build import ShardBuildConfig, build_shards
    from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
    from dstrain.data.tokenizer import train_tokenizer

    corpus = folder / "paragraphs.jsonl"
    source = find_sources([str(files("dstrain") / "corpora" / "austen.jsonl.gz")])
    with corpus.open("w", encoding="utf-8") as out:
        for document in read_documents(source, CorpusConfig()):
            for number, text in enumerate(t for t in document.text.split("\n") if len(t) > 20):
                out.write(json.dumps({"id": f"{document.id}-{number}", "text": text}) + "\n")
    texts = (d.text for d in read_documents(find_sources([str(corpus)]), CorpusConfig()))
    train_tokenizer(texts, kind="wordpiece", vocab_size=vocab_size, lowercase=True, out=folder / "tok", quiet=True)
    build_shards(
        [str(corpus)], tokenizer=folder / "tok", out=folder / "shards",
        config=ShardBuildConfig(validation_fraction=0.01), quiet=True,
    )  # fmt: skip


def run_dstrain(args: argparse.Namespace) -> dict[str, float]:
    from dstrain.base.config import validate
    from dstrain.base.device import choose_device
    from dstrain.base.world import world_from_environment

    world = world_from_environment()
    settings = {
        "run_folder": str(args.folder / "run"), "seed": SEED,
        "data": {"path": str(args.folder / "shards"), "sequence_length": SEQUENCE_LENGTH},
        "model": {"config": model_fields(args), "pad_vocab_to": 1 if args.model_vocab is None else args.model_vocab},
        "objective": {"mask_rate": MASK_RATE}, "optimizer": {"learning_rate": LEARNING_RATE},
        "engine": {"precision": args.precision, "threads": args.threads, "zero_stage": args.zero_stage},
        "train": {"global_batch": args.batch * world.size, "micro_batch": args.batch, "max_steps": args.warmup + args.steps, "evaluate_rows": 8},
    }  # fmt: skip
    from dstrain.stages.config import PretrainConfig

    config = validate(PretrainConfig, settings, source="benchmark")
    choose_device(config.engine.device)
    from dstrain.data.prefetch import Prefetcher
    from dstrain.stages.assembly import open_site
    from dstrain.stages.pretrain import assemble
    from dstrain.train.engine import Engine

    with open_site(config.engine, config.start, world) as site:
        parts = assemble(config, site)
        engine = Engine(
            parts.model, parts.objective, config=config.engine, optimizer=config.optimizer, control=site.control,
            device=site.device, precision=site.precision, micro_batch=args.batch, accumulation=parts.accumulation, seed=SEED,
        )  # fmt: skip
        tokens, started, cpu, losses = 0, 0.0, 0.0, []
        with Prefetcher(parts.loader, first_step=0, last_step=args.warmup + args.steps, depth=2) as steps:
            for step, data in steps:
                totals = engine.train_step(data, step=step, learning_rate=LEARNING_RATE)
                losses.append(totals.loss)
                if step + 1 == args.warmup:
                    started, cpu = time.perf_counter(), time.process_time()
                elif step >= args.warmup:
                    tokens += totals.num_tokens
        return _result(tokens, started, cpu, losses, world.rank)


def run_hf(args: argparse.Namespace, *, grouped: bool) -> dict[str, float]:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "tok")
    texts = [json.loads(line)["text"] for line in (args.folder / "paragraphs.jsonl").read_text().splitlines()]
    rows: list[list[int]] = []
    if grouped:
        flat = [t for ids in tokenizer(texts)["input_ids"] for t in ids]
        rows = [flat[i : i + SEQUENCE_LENGTH] for i in range(0, len(flat) - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)]
    else:
        rows = tokenizer(texts, truncation=True, max_length=SEQUENCE_LENGTH)["input_ids"]
    torch.manual_seed(SEED)
    size = len(tokenizer) if args.model_vocab is None else args.model_vocab
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(vocab_size=size, **model_fields(args)))
    seen: dict[str, Any] = {"tokens": 0, "started": 0.0, "cpu": 0.0, "losses": []}
    rank = int(os.environ.get("RANK", "0"))

    class Clock(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step == args.warmup:
                seen.update(tokens=0, started=time.perf_counter(), cpu=time.process_time())

    class Counting(DataCollatorForLanguageModeling):
        def torch_call(self, examples: Any) -> Any:
            batch = super().torch_call(examples)
            seen["tokens"] += int(batch["attention_mask"].sum())
            return batch

    class Recording(Trainer):
        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            result = super().compute_loss(*positional, **named)
            loss = float(result[0] if isinstance(result, tuple) else result)
            # With several processes the Trainer hands out the loss times their number, for DDP's mean to undo.
            seen["losses"].append(loss / int(os.environ.get("WORLD_SIZE", "1")))
            return result

    batch = args.batch if grouped else args.batch * args.padded_batch_factor
    arguments = TrainingArguments(
        output_dir=str(args.folder / "hf"), per_device_train_batch_size=batch, max_steps=args.warmup + args.steps,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.01, optim="adamw_torch_fused", seed=SEED,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        bf16=args.precision == "bf16", dataloader_num_workers=0, remove_unused_columns=False,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )  # fmt: skip
    trainer = Recording(
        model=model, args=arguments, train_dataset=[{"input_ids": r} for r in rows],
        data_collator=Counting(tokenizer, mlm_probability=MASK_RATE), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # The collator runs one batch ahead of the step, on every rank alike: the counted batches are those of the timed steps.
    return _result(seen["tokens"] * world, seen["started"], seen["cpu"], seen["losses"], rank)


def _result(tokens: int, started: float, cpu: float, losses: list[float], rank: int) -> dict[str, float]:
    wall = time.perf_counter() - started
    return {
        "rank": rank, "tokens": tokens, "wall_s": wall, "cpu_s": time.process_time() - cpu,
        "tokens_per_second": tokens / wall, "first_loss": losses[0], "last_loss": statistics.fmean(losses[-4:]),
    }  # fmt: skip


def launch(peer: str, processes: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One measured run in processes of its own; returns rank 0's figures."""
    out = folder / f"result-{peer}-{processes}-{time.monotonic_ns()}.json"
    passed = [
        "--worker", peer, "--folder", str(folder), "--out", str(out), "--steps", str(args.steps), "--warmup", str(args.warmup),
        "--batch", str(args.batch), "--hidden", str(args.hidden), "--layers", str(args.layers), "--precision", args.precision,
        "--threads", str(args.threads), "--zero-stage", str(args.zero_stage),
        "--padded-batch-factor", str(args.padded_batch_factor),
    ]  # fmt: skip
    passed += ["--model-vocab", str(args.model_vocab)] if args.model_vocab is not None else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(args.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if processes > 1 or peer == "dstrain":
            environment |= {
                "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        running.append(
            subprocess.Popen(
                [sys.executable, __file__, *passed], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        )
    errors = [process.communicate()[1].decode() for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{peer} failed:\n" + "\n".join(e[-2000:] for e in errors))
    return dict(json.loads(out.read_text()))


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def report(
    results: dict[str, dict[int, list[dict[str, float]]]], args: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    import importlib.metadata as metadata

    versions = {
        name: metadata.version(name) for name in ("dstrain", "torch", "deepspeed", "transformers", "accelerate")
    }
    data: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit(), "processor": processor(),
        "cores": len(os.sched_getaffinity(0)), "versions": versions, "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "results": results,
    }  # fmt: skip
    lines = [
        f"# Step speed against the Hugging Face Trainer, {data['date']}", "",
        f"Command: `{' '.join(['python', 'benchmarks/step_vs_hf.py', *sys.argv[1:]])}`", "",
        f"{data['processor']}, {data['cores']} cores, no GPU; commit {data['commit']}; "
        + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        f"BERT, hidden {args.hidden}, {args.layers} layers, vocabulary {args.model_vocab or args.vocab}, rows of {SEQUENCE_LENGTH}, "
        f"{args.batch} rows a process and step, {args.threads} thread(s) a process, {MASK_RATE:.0%} masking, {args.precision}, fused AdamW, ZeRO-{args.zero_stage} for dstrain. "
        f"{args.steps} timed steps after {args.warmup}, {args.rounds} interleaved rounds; median (min to max).", "",
        "| processes | peer | useful tokens/s | per CPU-second of rank 0 | against dstrain | loss, first → last |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for processes in args.processes:
        ours = [r["tokens_per_second"] for r in results["dstrain"][processes]]
        for peer in PEERS:
            runs = results[peer][processes]
            speed = [r["tokens_per_second"] for r in runs]
            ratios = [a / b for a, b in zip(ours, speed)]
            ratio = (
                "1"
                if peer == "dstrain"
                else f"dstrain is {statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"
            )
            economy = statistics.median(r["tokens"] / processes / r["cpu_s"] for r in runs)
            loss = f"{runs[-1]['first_loss']:.2f} → {runs[-1]['last_loss']:.2f}"
            lines.append(
                f"| {processes} | {peer} | {statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f}) | {economy:,.0f} | {ratio} | {loss} |"
            )
    lines += [
        "", "A useful token is a real one; padding does not count. Ratios are taken round by round. hf-grouped cuts documents and lets "
        "them attend to each other; dstrain and hf-padded do neither.",
        f"hf-padded puts {args.padded_batch_factor} × {args.batch} documents into a batch, about as many real tokens as the others.", "",
    ]  # fmt: skip
    return "\n".join(lines), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="rows of one process and step")
    parser.add_argument(
        "--padded-batch-factor", type=int, default=2, help="documents in an hf-padded batch, per row of the others"
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8000, help="of the tokenizer")
    parser.add_argument("--model-vocab", type=int, help="rows of the embedding, where larger (30522 is BERT's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--name", default="step-vs-hf", help="of the result files")
    for hidden in ("--worker", "--folder", "--out"):
        parser.add_argument(hidden, type=str if hidden == "--worker" else Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--threads", type=int, default=1, help="of each process; more than one is at the mercy of the neighbours"
    )
    args = parser.parse_args()
    if args.worker:
        result = run_dstrain(args) if args.worker == "dstrain" else run_hf(args, grouped=args.worker == "hf-grouped")
        if result["rank"] == 0:
            args.out.write_text(json.dumps(result))
        return
    results: dict[str, dict[int, list[dict[str, float]]]] = {peer: {p: [] for p in args.processes} for peer in PEERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args.vocab)
        for round_ in range(args.rounds):
            for processes in args.processes:
                order = PEERS if round_ % 2 == 0 else PEERS[::-1]
                for peer in order:
                    result = launch(peer, processes, args, folder)
                    results[peer][processes].append(result)
                    print(
                        f"round {round_ + 1} {processes} process(es) {peer}: {result['tokens_per_second']:,.0f} tokens/s",
                        flush=True,
                    )
    text, data = report(results, args)
    print(text)
    target = ROOT / "benchmarks" / "results"
    target.mkdir(parents=True, exist_ok=True)
    stem = f"{data['date']}-{args.name}"
    (target / f"{stem}.md").write_text(text)
    (target / f"{stem}.json").write_text(json.dumps(data, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
