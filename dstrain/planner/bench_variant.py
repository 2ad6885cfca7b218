"""One variant of `dstrain bench`, measured in a process of its own: `python -m dstrain.planner.bench_variant JOB.json`.

A process each, because memory, compiled graphs and allocator caches of one variant would colour the next. The engine, the loader and
the data are the run's own; the answer is written to the job's `out`. Evaluates and saves nothing.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dstrain.base.config import validate
from dstrain.base.device import choose_device
from dstrain.base.errors import DstrainError
from dstrain.base.protocols import IGNORED_LABEL, LossParts, MicroBatch, StepData
from dstrain.base.storage import read_json, write_json
from dstrain.base.world import World
from dstrain.monitor.flops import PassageSum
from dstrain.objectives.linear_cross_entropy import score_logits
from dstrain.planner.variants import Job
from dstrain.stages.config import PretrainConfig

if TYPE_CHECKING:
    from dstrain.stages.assembly import Assembly, Site


class LogitsObjective:
    """Masked-language modelling by logits, as the variants before the last savers do it. Implements `Objective`."""

    def __init__(self, *, every_token: bool) -> None:
        self._every_token = every_token

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Score logits of the targets, or of every token with all but the targets ignored."""
        if self._every_token:
            labels = torch.full_like(batch.tokens, IGNORED_LABEL)
            labels[batch.targets] = batch.labels
            everywhere = torch.arange(len(batch.tokens), device=batch.tokens.device)
            batch = dataclasses.replace(batch, targets=everywhere, labels=labels)
        return LossParts(*score_logits(model(batch), batch.labels))


def measure(job: Job) -> dict[str, Any]:
    """Tokens, seconds, memory and losses of the timed steps."""
    config = validate(PretrainConfig, job.config, source="dstrain bench")
    choose_device(config.engine.device)
    # These import DeepSpeed, which looks for its device when it is imported.
    from dstrain.stages.assembly import open_site  # noqa: PLC0415
    from dstrain.stages.pretrain import assemble  # noqa: PLC0415

    with open_site(config.engine, config.start, World()) as site:
        parts = assemble(config, site)
        if job.head != "inside":
            parts = dataclasses.replace(parts, objective=LogitsObjective(every_token=job.head == "every-token"))
        return _timed_steps(job, config, parts, site)


def _timed_steps(job: Job, config: PretrainConfig, parts: Assembly, site: Site) -> dict[str, Any]:
    from dstrain.models.huggingface import anatomy  # noqa: PLC0415
    from dstrain.stages.assembly import build_engine  # noqa: PLC0415
    from dstrain.stages.passage import passage_of  # noqa: PLC0415

    engine = build_engine(config, site, parts)
    passage, passed = passage_of(parts, anatomy(parts.model)), PassageSum()
    tokens, scored, losses = 0, 0, []
    started = begun = time.perf_counter()
    for step in range(job.warmup + job.steps):
        if step == job.warmup:
            _wait(site.device)
            begun = time.perf_counter()
        elif step > job.warmup and time.perf_counter() - begun > job.limit_s:
            break
        data: StepData = parts.loader.step(step)
        totals = engine.train_step(data, step=step, learning_rate=config.optimizer.learning_rate)
        losses.append(totals.loss)
        if step >= job.warmup:
            tokens, scored = tokens + totals.num_tokens, scored + totals.num_targets
            passed.add(totals.num_tokens, passage(step))
    _wait(site.device)
    seconds = time.perf_counter() - begun
    return {
        "tokens": tokens, "scored": scored, "seconds": seconds, "start_s": begun - started, "losses": losses,
        "peak_bytes": _peak_bytes(site.device), "device": site.device, "precision": site.precision, "notes": list(parts.notes),
        "compiling": engine.compiling.reason, "mean_context": parts.mean_context,
        "passage": dataclasses.asdict(passed.mean),
    }  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: str) -> int:
    """The allocator's peak on a GPU; the whole process's on a CPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Measure the job named on the command line; a user's fault is the last line on stderr."""
    job = Job(**read_json(Path(sys.argv[1])))
    try:
        write_json(Path(job.out), measure(job))
    except DstrainError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
