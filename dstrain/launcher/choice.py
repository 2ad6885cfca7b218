"""Which launcher fits: one decision from what was asked for and where this is, with its reason in words. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dstrain.base.errors import ConfigError
from dstrain.launcher.starters import Starter

Way = Starter | Literal["sbatch"]
"""How a stage is started; sbatch only puts a job into the queue, whose script then calls `dstrain launch` again."""

RANKS = ("pretrain", "finetune", "evaluate")
"""Stages of several ranks; the others are one process."""


@dataclass(frozen=True)
class Situation:
    """What the decision depends on."""

    stage: str
    asked: Way | None = None
    """`--with`."""
    hostfile: bool = False
    processes: int | None = None
    """`--num-processes`."""
    batch_options: tuple[str, ...] = ()
    """Options that only sbatch has, as given."""
    wants_gpus: bool = False
    """`engine.device: cuda`."""
    cpu_only: bool = False
    """`engine.device: cpu`."""
    gpus: int = 0
    """That this process sees."""
    allocation: int = 0
    """Nodes of the SLURM allocation that this runs in; 0 outside of one."""
    has_sbatch: bool = False
    """Whether `sbatch` is on PATH."""


@dataclass(frozen=True)
class Choice:
    """The way and why."""

    way: Way
    why: str


def choose(here: Situation) -> Choice:
    """Decide.

    Raises:
        ConfigError: what was asked for does not go together, or not here.
    """
    if here.asked is not None:
        choice = Choice(here.asked, "asked for by --with")
    elif here.batch_options:
        choice = Choice("sbatch", f"{here.batch_options[0]} is for a job of its own")
    elif here.stage not in RANKS:
        choice = Choice("python", f"{here.stage} is one process")
    elif here.hostfile:
        choice = Choice("deepspeed", "--hostfile")
    else:
        choice = _for_ranks(here)
    _check(here, choice)
    return choice


def _for_ranks(here: Situation) -> Choice:
    if here.allocation > 1:
        return Choice("srun", f"this is in a SLURM allocation of {here.allocation} nodes")
    if not here.allocation and here.has_sbatch and here.wants_gpus and not here.gpus and here.processes is None:
        return Choice("sbatch", "engine.device is cuda, this machine shows no GPU, and sbatch is here")
    if here.processes is not None:
        several, why = here.processes > 1, f"--num-processes {here.processes}"
    elif here.cpu_only:
        several, why = False, "engine.device is cpu"
    else:
        several, why = here.gpus > 1, f"this machine shows {here.gpus or 'no'} GPU{'' if here.gpus == 1 else 's'}"
    hint = "; --with sbatch would submit it" if here.has_sbatch and not here.allocation and not here.gpus else ""
    return Choice("deepspeed" if several else "python", why + hint)


def _check(here: Situation, choice: Choice) -> None:
    way = choice.way
    if here.processes is not None and here.processes < 1:
        raise ConfigError(f"--num-processes: must be 1 or more, got {here.processes}")
    if here.hostfile and way != "deepspeed":
        raise ConfigError(f"--hostfile is read by deepspeed, not by {way}: leave one of the two out")
    if here.batch_options and way != "sbatch":
        raise ConfigError(
            f"{here.batch_options[0]} is an option of --with sbatch, not of {way}: leave one of the two out"
        )
    if here.stage not in RANKS and way not in ("python", "sbatch"):
        raise ConfigError(f"--with {way}: {here.stage} is one process: use --with python or sbatch")
    if way == "sbatch":
        if here.processes is not None:
            raise ConfigError("--num-processes is for a start at once: give --nodes and --gpus-per-node to a job")
        if not here.has_sbatch:
            raise ConfigError("--with sbatch: sbatch is not on PATH: start this on a login node of the cluster")
        if here.allocation:
            raise ConfigError("--with sbatch: this is inside a SLURM job already; use --with srun, or a login node")
