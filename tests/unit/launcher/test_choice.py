"""Which launcher fits where, with its reason; and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.base.errors import ConfigError
from dstrain.launcher.choice import Situation, choose


def here(stage: str = "pretrain", **facts: Any) -> Situation:
    return Situation(stage, **facts)


@pytest.mark.parametrize(
    ("situation", "way", "why"),
    [
        (here(cpu_only=True), "python", "engine.device is cpu"),
        (here(gpus=1), "python", "1 GPU"),
        (here(gpus=8), "deepspeed", "8 GPUs"),
        (here(gpus=8, processes=1), "python", "--num-processes 1"),
        (here(processes=2), "deepspeed", "--num-processes 2"),
        (here(hostfile=True), "deepspeed", "--hostfile"),
        (here(allocation=2, gpus=8), "srun", "allocation of 2 nodes"),
        (here(allocation=1, gpus=8), "deepspeed", "8 GPUs"),
        (here(has_sbatch=True, wants_gpus=True), "sbatch", "cuda, this machine shows no GPU"),
        (here(has_sbatch=True, batch_options=("--nodes",)), "sbatch", "--nodes"),
        (here(has_sbatch=True, wants_gpus=True, gpus=2), "deepspeed", "2 GPUs"),
        (here(has_sbatch=True, wants_gpus=True, processes=1), "python", "--num-processes 1"),
        (here(has_sbatch=True), "python", "no GPUs; --with sbatch would submit it"),
        (here(wants_gpus=True), "python", "no GPUs"),
        (here(asked="torchrun", gpus=8), "torchrun", "--with"),
        (here("shards", gpus=8, allocation=2), "python", "one process"),
        (here("export", has_sbatch=True), "python", "one process"),
        (here("shards", has_sbatch=True, batch_options=("--array",)), "sbatch", "--array"),
    ],
)
def test_the_way_that_fits_is_chosen_and_says_why(situation: Situation, way: str, why: str) -> None:
    choice = choose(situation)
    assert choice.way == way
    assert why in choice.why


@pytest.mark.parametrize(
    ("situation", "message"),
    [
        (here(processes=0), "--num-processes: must be 1 or more, got 0"),
        (here(processes=-2, asked="torchrun"), "--num-processes: must be 1 or more, got -2"),
        (here(asked="torchrun", hostfile=True), "leave one of the two out"),
        (here(asked="srun", batch_options=("--time",)), "--time is an option of --with sbatch"),
        (here(hostfile=True, batch_options=("--nodes",), has_sbatch=True), "read by deepspeed, not by sbatch"),
        (here("export", asked="srun"), "export is one process"),
        (here(asked="sbatch"), "sbatch is not on PATH"),
        (here(batch_options=("--nodes",)), "sbatch is not on PATH"),
        (here(asked="sbatch", has_sbatch=True, allocation=1), "inside a SLURM job already"),
        (here(asked="sbatch", has_sbatch=True, processes=8), "give --nodes and --gpus-per-node"),
    ],
)
def test_what_does_not_go_together_is_refused(situation: Situation, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(situation)
