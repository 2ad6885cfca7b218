"""What `dstrain launch` must know of a stage before it starts it: arguments, run folder, settings.

Read once, here, so that a fault in them is one line and not one from every rank.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.errors import ConfigError
from dstrain.base.rank_settings import RankSettings
from dstrain.launcher.choice import RANKS


@dataclass(frozen=True)
class StagePlan:
    """One stage with its configuration, before it is known how it is started."""

    stage: str
    arguments: tuple[str, ...]
    """What stands behind `dstrain`."""
    script_arguments: tuple[str, ...]
    """The same for the stage's batch script."""
    run_folder: Path
    """Where history and logs go."""
    seed: int = 0
    device: str = "cpu"
    """`engine.device`."""
    settings: RankSettings = field(default_factory=RankSettings)
    global_batch: int | None = None
    """Of a training stage."""
    margin_s: float = 0.0
    """`stop.margin_s`."""

    @property
    def has_ranks(self) -> bool:
        """Whether it may be several processes that talk to each other."""
        return self.stage in RANKS


def read_stage(args: argparse.Namespace) -> StagePlan:
    """Read what the arguments name.

    Raises:
        ConfigError: a configuration, folder, key or argument is wrong.
    """
    if args.stage == "shards":
        return _shards(args)
    if args.stage == "export":
        return _export(args)
    overrides = [*args.overrides, *_overrides(args)]
    stray = [item for item in overrides if "=" not in item]
    if stray:
        raise ConfigError(f"{stray[0]!r}: give one configuration, and overrides as key=value")
    path = args.config.absolute()  # also never begins with a hyphen
    return _evaluate(args, path, overrides) if args.stage == "evaluate" else _training(args, path, overrides)


def _overrides(args: argparse.Namespace) -> list[str]:
    """`--bind` and `--interface` are words for keys of the configuration: ranks read nothing else."""
    return [f"engine.{name}={value}" for name in ("bind", "interface") if (value := getattr(args, name)) is not None]


def _training(args: argparse.Namespace, path: Path, overrides: list[str]) -> StagePlan:
    from dstrain.cli.training import load_stage_config

    config = load_stage_config(args.stage, path, overrides)
    return StagePlan(
        args.stage, (args.stage, "--config", str(path), *overrides), (str(path), *overrides, *_launch_options(args)),
        Path(config.run_folder).absolute(), global_batch=config.train.global_batch, margin_s=config.stop.margin_s,
        **_engine(config),
    )  # fmt: skip


def _evaluate(args: argparse.Namespace, path: Path, overrides: list[str]) -> StagePlan:
    from dstrain.cli.training import load_run_config

    _, config = load_run_config(path, overrides)
    words = (str(path), *overrides, *_checkpoint(args))
    return StagePlan("evaluate", ("evaluate", *words), words, Path(config.run_folder).absolute(), **_engine(config))


def _export(args: argparse.Namespace) -> StagePlan:
    run = args.config.absolute()
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run folder (config.yaml is missing)")
    out = [f"--out={args.out.absolute()}"] if args.out is not None else []
    words = (str(run), *out, *_checkpoint(args), *(["--overwrite"] if args.overwrite else []))
    return StagePlan("export", ("export", *words), words, run)


def _shards(args: argparse.Namespace) -> StagePlan:
    from dstrain.cli.launch_shards import build_words

    words = build_words(args, args.config)
    out = Path(next(word.partition("=")[2] for word in words if word.startswith("--out="))).absolute()
    # Beside the shards, as the build's own scratch folder: under --out nothing may appear before they are complete.
    return StagePlan("shards", ("shards", "build", *words), tuple(words), out.with_name(f".launch-{out.name}"))


def _checkpoint(args: argparse.Namespace) -> list[str]:
    """Which checkpoint of a run."""
    return [f"--{name}={value}" for name in ("step", "average") if (value := getattr(args, name)) is not None]


def _launch_options(args: argparse.Namespace) -> list[str]:
    """Options for the `dstrain launch` inside of the job."""
    names = ("max_restarts", "min_processes", "grace", "port")
    said = [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(args, name)) is not None]
    return [*said, *(f"--forward={name}" for name in args.forward)]


def _engine(config: Any) -> dict[str, Any]:
    settings = RankSettings(**{name: getattr(config.engine, name) for name in RankSettings.model_fields})
    return {"seed": config.seed, "device": config.engine.device, "settings": settings}


def say(text: str) -> None:
    """One line for people; a closed terminal does not end the run."""
    try:
        print(f"dstrain launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        return
