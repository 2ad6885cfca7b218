"""One measured run of one peer, in this process: `python step_peers.py JOB.json` (one process for each rank).

    dstrain       packed whole documents, unpadded, scored in the head, through the real loader and engine
    hand          a loop written by hand around the same model, kernels and batches, with torch's AdamW: what an engine costs
    hf-grouped    transformers.Trainer on text concatenated and cut into full rows, as run_mlm.py groups texts: no padding, but documents
                  are cut and attend to each other
    hf-padded     transformers.Trainer on one document a row, padded to the longest of the batch
    hf-deepspeed  hf-grouped with DeepSpeed ZeRO-1
    hf-compile    hf-grouped with torch_compile

A job says folder (from `prepare`), model fields, rows, steps, mask rate, precision and device. The answer, to the job's `out`, holds
real tokens, wall and CPU seconds of the timed steps, and the loss of every step. Everybody uses fused torch AdamW at a constant
rate, no dropout, no evaluation, no logging inside the clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

SEED, LEARNING_RATE, WEIGHT_DECAY = 1, 5e-4, 0.01
PEERS = ("dstrain", "hand", "hf-grouped", "hf-padded", "hf-deepspeed", "hf-compile")


@dataclass(frozen=True)
class Job:
    """What one run does; `kind` is model.kind for dstrain's side."""

    peer: str
    folder: str
    out: str
    model: dict[str, Any]
    row_length: int
    rows: int
    """Of one process and step, for peers with full rows."""
    warmup: int
    steps: int
    mask_rate: float
    kind: str = "huggingface"
    model_vocab: int | None = None
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    documents_per_row: int = 2
    """Documents in a padded batch, for each row of the others: about as many real tokens."""
    options: dict[str, Any] = field(default_factory=dict)
    """Sections of a run's configuration, for dstrain."""


def prepare(folder: Path, vocab_size: int, *, paragraphs: bool = True) -> None:
    """Paragraphs (or whole texts) of the embedded Austen corpus, a tokenizer and shards, made once for all peers."""
    from dstrain.corpus.build import ShardBuildConfig, build_shards
    from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
    from dstrain.data.tokenizer import train_tokenizer

    corpus = folder / "paragraphs.jsonl"
    sources = find_sources([str(files("dstrain") / "corpora" / "austen.jsonl.gz")])
    with corpus.open("w", encoding="utf-8") as out:
        for document in read_documents(sources, CorpusConfig()):
            parts = [t for t in document.text.split("\n") if len(t) > 20] if paragraphs else [document.text]
            for number, text in enumerate(parts):
                out.write(json.dumps({"id": f"{document.id}-{number}", "text": text}) + "\n")
    texts = (d.text for d in read_documents(find_sources([str(corpus)]), CorpusConfig()))
    train_tokenizer(texts, kind="wordpiece", vocab_size=vocab_size, lowercase=True, out=folder / "tok", quiet=True)
    build_shards(
        [str(corpus)], tokenizer=folder / "tok", out=folder / "shards",
        config=ShardBuildConfig(validation_fraction=0.02), quiet=True,
    )  # fmt: skip


class Clock:
    """Runs from the end of the last warm-up step to the end of the last step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._wall = self._cpu = 0.0
        self.tokens = 0
        self.losses: list[float] = []

    def step_done(self, step: int, tokens: int) -> None:
        """A step, counted from 0, is done."""
        if step + 1 == self._job.warmup:
            _wait(self._job.device)
            self._wall, self._cpu, self.tokens = time.perf_counter(), time.process_time(), 0
        elif step >= self._job.warmup:
            self.tokens += tokens

    def result(self, **more: Any) -> dict[str, Any]:
        _wait(self._job.device)
        return {
            "tokens": self.tokens, "wall_s": time.perf_counter() - self._wall, "cpu_s": time.process_time() - self._cpu,
            "losses": self.losses, **more,
        }  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def dstrain_config(job: Job, world_size: int) -> Any:
    from dstrain.base.config import validate
    from dstrain.stages.config import PretrainConfig

    settings: dict[str, Any] = {
        "run_folder": str(Path(job.folder) / "run"), "seed": SEED,
        "data": {"path": str(Path(job.folder) / "shards"), "sequence_length": job.row_length},
        "model": {"kind": job.kind, "config": job.model, "pad_vocab_to": job.model_vocab or 1},
        "objective": {"mask_rate": job.mask_rate},
        "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "betas": [0.9, 0.999], "eps": 1e-8},
        "engine": {"precision": job.precision, "threads": job.threads, "device": job.device},
        "train": {
            "global_batch": job.rows * world_size, "micro_batch": job.rows, "max_steps": job.warmup + job.steps,
            "evaluate_rows": 8,
        },
    }  # fmt: skip
    for name in settings.keys() & job.options.keys():
        section = job.options[name]
        settings[name] = {**settings.get(name, {}), **section}
    return validate(PretrainConfig, settings, source="benchmark")


def run_dstrain(job: Job, *, by_hand: bool) -> dict[str, Any]:
    from dstrain.base.device import choose_device
    from dstrain.base.world import world_from_environment

    world = world_from_environment()
    config = dstrain_config(job, world.size)
    choose_device(config.engine.device)
    from dstrain.data.prefetch import Prefetcher
    from dstrain.stages.assembly import open_site
    from dstrain.stages.pretrain import assemble

    last = job.warmup + job.steps
    with open_site(config.engine, config.start, world) as site:
        parts = assemble(config, site)
        with Prefetcher(parts.loader, first_step=0, last_step=last, depth=2) as steps:
            return _by_hand(job, parts, site, steps) if by_hand else _by_engine(job, config, parts, site, steps)


def _by_engine(job: Job, config: Any, parts: Any, site: Any, steps: Iterable[tuple[int, Any]]) -> dict[str, Any]:
    from dstrain.stages.assembly import build_engine

    engine = build_engine(config, site, parts)
    clock, waited = Clock(job), 0.0
    asked = time.perf_counter()
    for step, data in steps:
        waited += time.perf_counter() - asked if step >= job.warmup else 0.0
        totals = engine.train_step(data, step=step, learning_rate=LEARNING_RATE)
        clock.losses.append(totals.loss)
        clock.step_done(step, sum(batch.num_tokens for batch in data.micro_batches))
        asked = time.perf_counter()
    return clock.result(
        data_wait_s=waited, notes=[*parts.notes, engine.compiling.reason], mean_context=parts.mean_context
    )


def _by_hand(job: Job, parts: Any, site: Any, steps: Iterable[tuple[int, Any]]) -> dict[str, Any]:
    """What the engine's step does, in twenty lines: same batches, model, objective; torch's AdamW; all-reduce by hand."""
    import torch
    from torch import distributed

    from dstrain.models.blocks import compile_blocks
    from dstrain.train.compiling import choose_compiling, few_shapes
    from dstrain.train.device_feed import DeviceFeed
    from dstrain.train.ds_config import EngineConfig

    model = parts.model.to(job.device)
    half = job.precision == "bf16"
    compiling = choose_compiling(EngineConfig(**job.options.get("engine", {})), device=job.device, unpadded=True)
    if compiling.enabled:
        compile_blocks(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=True)
    clock = Clock(job)
    feed = DeviceFeed(job.device)
    for step, data in steps:
        [batch] = data.micro_batches
        if compiling.enabled:
            batch = few_shapes(batch, usual_tokens=job.rows * job.row_length)
        [batch] = feed([batch])
        count = torch.tensor(float(batch.num_targets))
        if site.world.size > 1:
            distributed.all_reduce(count)
        with torch.autocast(job.device, torch.bfloat16, enabled=half):
            loss = parts.objective.loss(model, batch).loss_sum
        (loss / count.to(job.device)).backward()
        total = loss.detach()
        if site.world.size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            distributed.all_reduce(flat)
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(part.view_as(p))
            distributed.all_reduce(total)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(float(total) / float(count))
        clock.step_done(step, batch.num_tokens)
    return clock.result()


def run_hf(job: Job) -> dict[str, Any]:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    if job.peer == "hf-deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # else it builds an op that serves inference only
        )
    torch.set_num_threads(job.threads)
    folder = Path(job.folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    rows = _padded_rows(job, tokenizer) if job.peer == "hf-padded" else _full_rows(job, tokenizer)
    torch.manual_seed(SEED)
    special = {
        "pad_token_id": tokenizer.pad_token_id, "cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id,
    }  # fmt: skip
    size = -(-len(tokenizer) // (job.model_vocab or 1)) * (job.model_vocab or 1)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(vocab_size=size, **special, **job.model))
    clock = Clock(job)
    counted = {"tokens": 0}
    world = int(os.environ.get("WORLD_SIZE", "1"))

    class Steps(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            # The collator runs one batch ahead of the step: what it counts is the next step's, as many as there are steps.
            clock.step_done(state.global_step - 1, counted["tokens"])
            counted["tokens"] = 0

    class Counting(DataCollatorForLanguageModeling):
        def torch_call(self, examples: Any) -> Any:
            batch = super().torch_call(examples)
            counted["tokens"] += int(batch["attention_mask"].sum())
            return batch

    class Recording(Trainer):
        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            result = super().compute_loss(*positional, **named)
            loss = result[0] if isinstance(result, tuple) else result
            clock.losses.append(loss.detach())  # read after the clock has stopped
            return result

    trainer = Recording(
        model=model, args=_arguments(job, TrainingArguments), train_dataset=[{"input_ids": r} for r in rows],
        data_collator=Counting(tokenizer, mlm_probability=job.mask_rate), callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
    # With several processes the Trainer hands out the loss times their number, for the mean over them to undo.
    return {**clock.result(), "losses": [float(loss) / world for loss in clock.losses]}


def _arguments(job: Job, arguments: Any) -> Any:
    batch = job.rows * (job.documents_per_row if job.peer == "hf-padded" else 1)
    more: dict[str, Any] = {}
    if job.peer == "hf-deepspeed":
        more["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
            "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
    if job.peer == "hf-compile":
        more["torch_compile"] = True
    return arguments(
        output_dir=str(Path(job.folder) / "hf"), per_device_train_batch_size=batch, max_steps=job.warmup + job.steps,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=WEIGHT_DECAY, optim="adamw_torch_fused",
        seed=SEED, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_drop_last=True,  # a last batch of another size would be compiled anew inside the clock
        use_cpu=job.device == "cpu", bf16=job.precision == "bf16", dataloader_num_workers=0, remove_unused_columns=False,
        ddp_backend="gloo" if "RANK" in os.environ and job.peer != "hf-deepspeed" and job.device == "cpu" else None, **more,
    )  # fmt: skip


def _texts(job: Job) -> list[str]:
    """The training documents, without those that dstrain's build held out: equal text for all."""
    return [json.loads(line)["text"] for line in (Path(job.folder) / "paragraphs.jsonl").read_text().splitlines()]


def _full_rows(job: Job, tokenizer: Any) -> list[list[int]]:
    flat = [t for ids in tokenizer(_texts(job))["input_ids"] for t in ids]
    return [flat[i : i + job.row_length] for i in range(0, len(flat) - job.row_length + 1, job.row_length)]


def _padded_rows(job: Job, tokenizer: Any) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(_texts(job), truncation=True, max_length=job.row_length)["input_ids"]
    return rows


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    result = run_dstrain(job, by_hand=job.peer == "hand") if job.peer in ("dstrain", "hand") else run_hf(job)
    result["peak_bytes"] = peak_memory(job.device)
    rank = int(os.environ.get("RANK", "0"))
    Path(f"{job.out}.{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
