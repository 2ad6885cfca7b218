"""Score a finished (or running) run's checkpoint on its held-out data, with the same engine and batches as in training."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from dstrain.base.errors import ConfigError
from dstrain.base.peer_loss import peer_loss_named
from dstrain.base.world import World
from dstrain.checkpoint.manifest import MASTER
from dstrain.stages import finetune, pretrain
from dstrain.stages.assembly import build_engine, open_site
from dstrain.stages.averaging import average_of
from dstrain.stages.config import FinetuneConfig, PretrainConfig
from dstrain.stages.initial import best_checkpoint


def evaluate(
    stage: str, config: PretrainConfig | FinetuneConfig, world: World, *, step: int | None, average: str | None = None
) -> dict[str, float]:
    """Collective. The held-out metrics of a checkpoint; writes nothing.

    Args:
        stage: pretrain or finetune, as the run says.
        config: of the run.
        world: this process's place; any number of processes gives the same metrics.
        step: which checkpoint; None takes the best by metric, else the newest valid one.
        average: `last:K` scores the mean of the K newest checkpoints (up to `step`).

    Raises:
        ConfigError: the run has no such checkpoint, or nothing to evaluate on.
    """
    with ExitStack() as stack:
        stack.enter_context(peer_loss_named(lambda: "in an evaluation"))
        site = stack.enter_context(open_site(config.engine, config.start, world))
        mean = site.control.together(lambda: average and average_of(config.run_folder, average, step=step))
        checkpoint = (
            mean.newest if mean else site.control.together(lambda: best_checkpoint(config.run_folder, step=step))
        )
        if isinstance(config, PretrainConfig):
            pretraining = config
            parts = site.control.together(lambda: pretrain.assemble(pretraining, site))
        else:
            finetuning = config
            parts = site.control.together(lambda: finetune.assemble(finetuning, site))
        if parts.evaluate is None:
            raise ConfigError(f"{config.run_folder}: a {stage} run without held-out data cannot be evaluated")
        engine = build_engine(config, site, parts)
        fragments = engine.fragments
        if mean:
            fragments.fill_masters(mean.weights)
        else:
            with torch.no_grad():
                site.control.together(lambda: checkpoint.load_into(f for f in fragments.held() if f.state == MASTER))
            fragments.refresh()
        metrics = parts.evaluate(engine, None)
        return {"step": checkpoint.manifest.step, **metrics}
