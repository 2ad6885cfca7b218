"""Wall time until dstrain has the held-out loss that the Hugging Face Trainer ends with: same corpus, model size and cores.

    python benchmarks/time_to_loss.py                      # about 25 minutes on 2 cores
    python benchmarks/time_to_loss.py --hf-steps 40 --rounds 1

The Trainer runs run_mlm.py's way (text concatenated and cut into full rows, 15 % masking, fused AdamW, warm-up and linear decay to 0) for
a number of steps, and its final model is scored on the held-out documents, each alone, with fixed masks. dstrain then trains the same
model with the same rows a step, mask rate, optimizer, peak rate and warm-up, then a constant rate, and is scored in the same
way every few steps until its loss is as low. Both clocks leave out start-up, tokenising and scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from header import ROOT, Facts
from step import PACKAGES, bert, measure
from step_peers import LEARNING_RATE, WEIGHT_DECAY, Job, dstrain_config, prepare

WARMUP_SHARE = 0.06


def run_dstrain(job: Job) -> dict[str, Any]:
    """Train until the held-out loss is as low as the job's goal."""
    from dstrain.base.device import choose_device
    from dstrain.base.world import world_from_environment

    world = world_from_environment()
    config = dstrain_config(job, world.size)
    choose_device("cpu")
    from dstrain.data.prefetch import Prefetcher
    from dstrain.stages.assembly import build_engine, open_site
    from dstrain.stages.pretrain import assemble

    goal, every, warmup = job.options["goal"]["loss"], job.options["goal"]["every"], job.options["goal"]["warmup"]
    with open_site(config.engine, config.start, world) as site:
        parts = assemble(config, site)
        engine = build_engine(config, site, parts)
        assert parts.evaluate is not None
        seconds, points = 0.0, []
        with Prefetcher(parts.loader, first_step=0, last_step=job.steps, depth=2) as steps:
            started = time.perf_counter()
            for step, data in steps:
                engine.train_step(data, step=step, learning_rate=LEARNING_RATE * min(1.0, (step + 1) / warmup))
                if (step + 1) % every:
                    continue
                seconds += time.perf_counter() - started
                points.append((step + 1, seconds, parts.evaluate(engine, None)["loss"]))
                if points[-1][2] <= goal:
                    break
                started = time.perf_counter()
        return {"points": points, "reached": points[-1][2] <= goal, "tokens": 0, "cpu_s": 1, "losses": [0.0]}


def run_hf(job: Job) -> dict[str, Any]:
    """Train for the job's steps; the held-out loss of the end."""
    import step_peers
    from transformers import Trainer

    kept: list[Trainer] = []
    train = Trainer.train

    def keep(self: Trainer, *positional: Any, **named: Any) -> Any:
        kept.append(self)
        return train(self, *positional, **named)

    arguments = step_peers._arguments

    def decaying(job: Job, kind: Any) -> Any:
        made = arguments(job, kind)
        made.lr_scheduler_type, made.warmup_steps = "linear", max(1, round(WARMUP_SHARE * (job.warmup + job.steps)))
        return made

    Trainer.train, step_peers._arguments = keep, decaying  # type: ignore[method-assign]
    result = step_peers.run_hf(job)
    loss = _held_out_loss(job, kept[0].model) if os.environ.get("RANK", "0") == "0" else 0.0
    return {**result, "held_out_loss": loss}


def _held_out_loss(job: Job, model: Any) -> float:
    """On the batches that dstrain's evaluation scores, by the same code."""
    import torch

    from dstrain.base.control import ControlPlane
    from dstrain.base.world import World
    from dstrain.models.encoders import MaskedLanguageModel
    from dstrain.objectives.mlm import MlmObjective
    from dstrain.stages.assembly import Site
    from dstrain.stages.pretrain import assemble

    world = World(rank=0, size=1, local_rank=0, local_size=1)
    site = Site(world, ControlPlane(world, timeout_s=60), "cpu", "fp32")
    parts = assemble(dstrain_config(job, 1), site)
    wrapped, objective = MaskedLanguageModel(model.eval()), MlmObjective()

    class Scorer:
        control = site.control

        @torch.no_grad()
        def evaluate(self, batches: Any, **_: Any) -> tuple[float, float, int]:
            scored = [objective.loss(wrapped, batch) for batch in batches]
            targets = sum(batch.num_targets for batch in batches)
            return (
                sum(float(s.loss_sum) for s in scored) / targets,
                sum(float(s.correct) for s in scored) / targets,
                targets,
            )

    assert parts.evaluate is not None
    return parts.evaluate(Scorer(), None)["loss"]  # type: ignore[arg-type]


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        job = Job(**json.loads(Path(sys.argv[1]).read_text()))
        result = run_dstrain(job) if job.peer == "dstrain" else run_hf(job)
        Path(f"{job.out}.{os.environ.get('RANK', '0')}").write_text(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=10, help="steps between dstrain's scorings")
    parser.add_argument("--rows", type=int, default=32, help="rows of one process and step")
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--model-vocab", type=int, default=30522)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", default="time-to-loss")
    args = parser.parse_args()
    facts = Facts.now(__file__, packages=PACKAGES)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.vocab)
        for number in range(args.rounds):
            rounds.append(one_round(args, folder))
            found = rounds[-1]
            print(
                f"round {number + 1}: Trainer {found['hf_s']:.0f} s to {found['goal']:.3f}; dstrain {found['dstrain_s']:.0f} s, "
                f"{found['dstrain_steps']} steps, {found['dstrain_s'] / found['hf_s']:.2f} of the time",
                flush=True,
            )
    report(args, facts, rounds)


def one_round(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The Trainer to its end, then dstrain to its loss."""
    common: dict[str, Any] = {
        "folder": folder, "model": bert(args.hidden, args.layers, args.row_length), "row_length": args.row_length, "rows": args.rows,
        "mask_rate": 0.15, "model_vocab": args.model_vocab,
    }  # fmt: skip
    script = Path(__file__).resolve()
    scored = {"train": {"evaluate_rows": 512}}
    theirs = measure(
        Job(peer="hf-grouped", out=f"{folder}/hf", warmup=1, steps=args.hf_steps - 1, options=scored, **common),
        args.processes, script=script,
    )  # fmt: skip
    goal = {"loss": theirs["held_out_loss"], "every": args.every, "warmup": max(1, round(WARMUP_SHARE * args.hf_steps))}
    ours = measure(
        Job(peer="dstrain", out=f"{folder}/ds", warmup=0, steps=3 * args.hf_steps, options={**scored, "goal": goal}, **common),
        args.processes, script=script,
    )  # fmt: skip
    if not ours["reached"]:
        raise SystemExit(f"dstrain did not reach {goal['loss']:.3f} in {3 * args.hf_steps} steps: {ours['points'][-1]}")
    steps, seconds, loss = ours["points"][-1]
    # The first step of the Trainer is its warm-up, left out of its clock; it is put back at the mean of the others.
    hf_s = theirs["wall_s"] * args.hf_steps / (args.hf_steps - 1)
    return {
        "goal": goal["loss"],
        "hf_s": hf_s,
        "dstrain_s": seconds,
        "dstrain_steps": steps,
        "dstrain_loss": loss,
        "points": ours["points"],
    }


def report(args: argparse.Namespace, facts: Facts, rounds: list[dict[str, Any]]) -> None:
    """Print and keep the result."""
    ratios = [r["dstrain_s"] / r["hf_s"] for r in rounds]
    lines = [
        f"# Time to the Trainer's held-out loss, {facts.date}", "", facts.text(), "",
        f"BERT, hidden {args.hidden}, {args.layers} layers, vocabulary {args.model_vocab}, rows of {args.row_length}, {args.rows} rows a process and step, "
        f"{args.processes} processes of one thread, 15 % masking, fp32, fused AdamW, peak rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}; "
        f"the Trainer takes {args.hf_steps} steps.", "",
        "| round | held-out loss of the Trainer | its seconds | dstrain's seconds | steps | loss | share of the time |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for number, (r, ratio) in enumerate(zip(rounds, ratios), 1):
        lines.append(
            f"| {number} | {r['goal']:.3f} | {r['hf_s']:.0f} | {r['dstrain_s']:.0f} | {r['dstrain_steps']} | {r['dstrain_loss']:.3f} | {ratio:.2f} |"
        )
    lines += ["", f"Median share: {statistics.median(ratios):.2f}.", ""]
    text = "\n".join(lines)
    print(text)
    stem = ROOT / "benchmarks" / "results" / f"{facts.date}-{args.name}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"facts": facts.to_json(), "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
