"""`dstrain pretrain`, `finetune` and `evaluate`: the same commands that launch/*.py run under a launcher."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dstrain.base.config import Config, load_config, merge, parse_overrides, read_yaml, validate
from dstrain.base.errors import ConfigError, DstrainError, MachineError, PeerError
from dstrain.base.privacy import make_private
from dstrain.base.rank_settings import RankSettings
from dstrain.base.secrets import refuse_redacted
from dstrain.base.world import World
from dstrain.health.signals import StopRequest

if TYPE_CHECKING:
    from dstrain.base.device import DeviceChoice

ResultT = TypeVar("ResultT")

_STAGES = {
    "pretrain": (
        "pretrain a masked-language model on shards",
        "deepspeed --num_gpus 8 launch/pretrain.py --config configs/bert-base.yaml train.max_steps=1000\n"
        "  torchrun --nproc-per-node 8 launch/pretrain.py --config configs/bert-base.yaml\n"
        "  srun python launch/pretrain.py --config configs/bert-base.yaml\n"
        "  dstrain pretrain configs/demo/pretrain.yaml          (one process)",
    ),
    "finetune": (
        "fine-tune an encoder on a task given as files",
        "deepspeed --num_gpus 8 launch/finetune.py --config configs/finetune/sst2.yaml model.init_from=runs/bert-base\n"
        "  dstrain finetune configs/finetune/sst2.yaml task.train=train.tsv",
    ),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the training commands."""
    for stage, (summary, examples) in _STAGES.items():
        parser = subparsers.add_parser(
            stage,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. Starting again with the same run_folder resumes from its newest "
            "valid checkpoint, at any number of processes and any ZeRO stage.",
            epilog=f"examples:\n  {examples}\n\nkeys: docs/configuration.md",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_run_arguments(parser)
        parser.set_defaults(run=_run_stage, stage=stage, more_into="items")
    parser = subparsers.add_parser(
        "evaluate",
        help="score a run's checkpoint on its held-out data",
        description="Load a run's checkpoint and score its held-out data: masked loss and accuracy, or the task's metrics.",
        epilog="examples:\n  dstrain evaluate runs/bert-base\n"
        "  deepspeed --num_gpus 8 launch/evaluate.py --run runs/bert-base --step 1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", nargs="?", type=Path, help="the run folder")
    parser.add_argument("--run", dest="run_option", type=Path, metavar="FOLDER", help="the same, as an option")
    parser.add_argument("--step", type=int, help="checkpoint to score; default: the best by metric, else the newest")
    parser.add_argument(
        "--average", metavar="last:K", help="score the mean of the K newest checkpoints (up to --step) instead of one"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the run's configuration")
    parser.set_defaults(run=_run_evaluate, more_into="overrides")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's YAML")
    parser.add_argument(
        "items", nargs="*", metavar="FILE | key=value", help="the run's YAML, and overrides such as train.max_steps=100"
    )
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=Path,
        metavar="FILE",
        help="JSON laid over the `deepspeed:` section",
    )
    parser.add_argument(
        "--accept-new-data",
        action="store_true",
        help="resume although the shards or their order changed since the checkpoint; recorded as a new phase of the run",
    )
    parser.add_argument(
        "--deepspeed", action="store_true", help=argparse.SUPPRESS
    )  # the ecosystem's flag; always on here
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)


def _split_items(args: argparse.Namespace) -> tuple[Path, list[str]]:
    overrides = [item for item in args.items if "=" in item]
    files = [Path(item) for item in args.items if "=" not in item] + ([args.config] if args.config else [])
    if len(files) != 1:
        found = ", ".join(str(f) for f in files) or "none"
        raise ConfigError(
            f"give exactly one configuration file (found: {found}), for example --config configs/bert-base.yaml; "
            "overrides are written key.path=value"
        )
    return files[0], overrides


def _run_stage(args: argparse.Namespace) -> int:
    from dstrain.base.logs import configure_logs
    from dstrain.base.world import world_from_environment

    world = world_from_environment(local_rank=args.local_rank)
    configure_logs(world)
    # In force before the imports of the stage, which take seconds: a request in that time must not just kill the process.
    with StopRequest(watch_parent=world.size > 1) as stop:

        def said(read: Callable[[], ResultT]) -> ResultT:
            return said_once(world, read, should_leave=lambda: stop.reason is not None)

        said(lambda: _take_up(world, *_split_items(args)))
        config = said(lambda: _stage_config(args))
        said(lambda: make_private(config.run_folder))
        choose_early(config.engine.device)
        if args.stage == "pretrain":
            from dstrain.stages.pretrain import pretrain

            return int(pretrain(config, world, stop=stop))
        from dstrain.stages.finetune import finetune

        return int(finetune(config, world, stop=stop))


def _take_up(world: World, path: Path, overrides: list[str]) -> None:
    """Threads, cores and interfaces first: reading the whole configuration imports torch, which makes its thread pools."""
    from dstrain.launcher.rank_environment import take_up

    engine = merge(read_yaml(path), parse_overrides(overrides)).get("engine", {})
    fields = {name: engine[name] for name in RankSettings.model_fields if isinstance(engine, dict) and name in engine}
    try:
        settings = validate(RankSettings, fields, source=str(path))
    except ConfigError:  # the whole configuration's reader says it better, at once
        return
    with contextlib.suppress(DstrainError):  # of this machine: said when the ranks have met, to all of them
        take_up(settings, world, os.environ)


def _run_evaluate(args: argparse.Namespace) -> int:
    from dstrain.base.logs import configure_logs
    from dstrain.base.world import world_from_environment

    world = world_from_environment(local_rank=args.local_rank)
    configure_logs(world)
    folder: Path | None = args.run_option or args.run_folder
    if folder is not None and (folder / "config.yaml").is_file():
        said_once(world, lambda: _take_up(world, folder / "config.yaml", [i for i in args.overrides if "=" in i]))
    stage, config = said_once(world, lambda: _evaluated_run(args))
    choose_early(config.engine.device)
    from dstrain.stages.evaluate import evaluate

    metrics = evaluate(stage, config, world, step=args.step, average=args.average)
    if world.is_first:
        print(json.dumps(metrics, indent=1))
    return 0


def said_once(
    world: World, read: Callable[[], ResultT], *, should_leave: Callable[[], bool] = lambda: False
) -> ResultT:
    """Read what decides the run, before the ranks have met; of those that find a fault one says it, and all leave.

    Args:
        world: this process's place.
        read: local.
        should_leave: whether to stop waiting for other hosts.
    """
    try:
        return read()
    except DstrainError as error:
        if world.size > 1 and not world.is_on_one_host:  # another host may have found none, and would wait
            from dstrain.base.early_fault import tell

            raise tell(error, world, should_leave=should_leave) from None
        if world.is_first:
            raise
        raise PeerError(str(error), exit_code=error.exit_code) from None


def _stage_config(args: argparse.Namespace) -> Any:
    path, overrides = _split_items(args)
    if args.accept_new_data:
        overrides.append("train.accept_new_data=true")
    return load_stage_config(args.stage, path, overrides, overlay=args.deepspeed_config)


def _evaluated_run(args: argparse.Namespace) -> tuple[str, Any]:
    overrides = list(args.overrides)
    folder = args.run_option or args.run_folder
    if args.run_option is not None and args.run_folder is not None:
        overrides.insert(0, str(args.run_folder))
    if folder is None:
        raise ConfigError("give the run folder, for example: dstrain evaluate runs/bert-base")
    return load_run_config(folder, overrides)


def load_stage_config(stage: str, path: Path, overrides: list[str], *, overlay: Path | None = None) -> Any:
    """The validated configuration of a stage.

    Raises:
        ConfigError: see `base.config.load_config`; or the file, or the run folder, is the other stage's.
    """
    from dstrain.stages.config import FinetuneConfig, PretrainConfig

    model: type[Config] = PretrainConfig if stage == "pretrain" else FinetuneConfig
    below: dict[str, Any] = {}
    if overlay is not None:
        from dstrain.base.storage import read_json
        from dstrain.train.ds_config import check_overlay

        below = {"deepspeed": check_overlay(read_json(overlay), source=str(overlay))}
    return load_config(model, path, overrides, overlay=below, check=lambda data: _refuse_other_stage(stage, data, path))


def _refuse_other_stage(stage: str, data: Mapping[str, Any], path: Path) -> None:
    """A file of the other stage, or a run folder that a run of it owns: said before anything is written there."""
    if not data:
        raise ConfigError(f"{path}: holds no keys. Start from one of configs/; every key: docs/configuration.md")
    for section, owner in (("data", "pretrain"), ("task", "finetune")):
        others = {"data", "task"} - {section}
        if owner != stage and section in data and not others & set(data):
            raise ConfigError(
                f"{path}: has the section {section}, so it configures `dstrain {owner}`; this is {stage}. Give another file"
            )
    folder = data.get("run_folder")
    if not isinstance(folder, str) or not (Path(folder) / "config.yaml").is_file():
        return
    held = read_yaml(Path(folder) / "config.yaml").get("stage", stage)
    if held != stage:
        raise ConfigError(f"run_folder: {folder}: holds a {held} run, this is {stage}: set another run_folder")


def load_run_config(folder: Path, overrides: list[str]) -> tuple[str, Any]:
    """Stage and configuration of an existing run.

    Raises:
        ConfigError: the folder is not a run.
    """
    from dstrain.stages.config import FinetuneConfig, PretrainConfig

    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: not a run folder (config.yaml is missing)")
    data = read_yaml(folder / "config.yaml")
    stage = str(data.pop("stage", "pretrain"))
    data = merge(data, parse_overrides(overrides))
    refuse_redacted(data, source=str(folder / "config.yaml"))
    data["run_folder"] = str(folder)
    return stage, validate(
        PretrainConfig if stage == "pretrain" else FinetuneConfig, data, source=str(folder / "config.yaml")
    )


def choose_early(device: DeviceChoice) -> None:
    """Choose the device before the engine's library is imported: it looks once, at import."""
    from dstrain.base.device import choose_device

    try:
        choose_device(device)
    except MachineError:  # said when the ranks have met, to all of them, and with this host's name
        os.environ["DS_ACCELERATOR"] = "cpu"
