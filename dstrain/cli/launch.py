"""`dstrain launch STAGE CONFIG`: start a stage under a launcher, and start it again until it is complete or not worth it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dstrain.launcher.hosts import Host
    from dstrain.launcher.starters import Layout, Starter
    from dstrain.launcher.supervisor import Job

_STAGES = ("pretrain", "finetune", "evaluate")
_EPILOG = """
examples:
  dstrain launch pretrain configs/bert-base.yaml --num-processes 8 --max-restarts 20
  dstrain launch pretrain configs/bert-base.yaml --hostfile hosts --min-processes 24 data.path=/data/shards
  dstrain launch finetune configs/finetune/sst2.yaml --with torchrun --num-processes 4
  dstrain launch evaluate runs/bert-base
  dstrain launch pretrain configs/bert-base.yaml --num-processes 8 --dry-run      (print the command, start nothing)

Restarts the real launcher from the newest valid checkpoint when ranks crash or are killed, and cleans up what it started
and nothing else. Stops when the run is complete (0), was asked to stop and has saved (75, 82), cannot go on (78, 80, 81),
or makes no progress three times in a row (79; the last time from one checkpoint further back). SIGTERM, SIGINT, SIGUSR1
and SIGUSR2 reach the ranks, which save and leave; what SLURM sends to the ranks of srun itself counts the same. History:
supervisor.json in the run folder; output: logs/attempt-*.log, under srun one more for each rank.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `launch`."""
    parser = subparsers.add_parser(
        "launch",
        help="start a stage under a launcher and restart it after failures",
        description="Start a stage under deepspeed, torchrun, srun or plain python, supervise it, and restart it after failures.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=_STAGES, help="what runs")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML; for evaluate, the run folder")
    parser.add_argument("--with", dest="starter", choices=("deepspeed", "torchrun", "srun", "python"),
                        help="the launcher; default: srun in an allocation of several nodes, deepspeed for several "
                        "processes or a hostfile, else python")  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--num-processes", type=int, metavar="N", help="ranks; default: one for each GPU, or one")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`, for deepspeed over ssh")
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="restarts in all (default 10)")
    parser.add_argument("--min-processes", type=int, metavar="K",
                        help="leave unhealthy hosts out as long as this many ranks remain; default: never")  # fmt: skip
    parser.add_argument("--grace", type=float, default=120.0, metavar="SECONDS",
                        help="time for the ranks to save when asked to stop (default 120)")  # fmt: skip
    parser.add_argument("--unhealthy-hosts", type=Path, metavar="FILE",
                        help="write the hosts that code 77 is about there, separated by commas, as scontrol takes them")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the exact command and environment, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the configuration")
    parser.set_defaults(run=_run, more_into="overrides")


def _run(args: argparse.Namespace) -> int:
    from dstrain.base.config import validate
    from dstrain.base.privacy import make_private
    from dstrain.base.world import free_port
    from dstrain.launcher.policy import RestartPolicy
    from dstrain.launcher.run_files import LOGS
    from dstrain.launcher.starters import build_command
    from dstrain.launcher.supervisor import Supervisor, show_plan

    given = {"max_restarts": args.max_restarts, "min_processes": args.min_processes, "grace_s": args.grace}
    policy = validate(RestartPolicy, given, source="dstrain launch")
    job = _job(args, os.environ)
    hosts = job.layout.hosts
    hostfile = job.run_folder / LOGS / "hosts-0001" if hosts else None
    command = build_command(job.layout, job.arguments, port=free_port(), hostfile=hostfile, folder=str(Path.cwd()))
    if args.dry_run:
        print(show_plan(command, policy), end="")
        return 0
    make_private(job.run_folder)
    code = Supervisor(job, policy, say=_say, out=sys.stdout.buffer).run()
    if args.unhealthy_hosts is not None:
        _write_unhealthy_hosts(args.unhealthy_hosts, job.run_folder if code == ExitCode.UNHEALTHY_NODE else None)
    return int(code)


def _write_unhealthy_hosts(path: Path, run_folder: Path | None) -> None:
    from dstrain.base.storage import write_text
    from dstrain.launcher.history import read_history
    from dstrain.launcher.hosts import check_host

    hosts = read_history(run_folder)[-1].hosts_at_fault if run_folder is not None else ()
    write_text(path, ",".join(check_host(host) for host in hosts) + "\n")


def _say(text: str) -> None:
    """One line for people; a closed terminal does not end the run."""
    try:
        print(f"dstrain launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        return


def _job(args: argparse.Namespace, environment: Mapping[str, str]) -> Job:
    """Read the configuration once, here, so that a fault in it is one line and not one from every rank."""
    from dstrain.cli.training import load_run_config, load_stage_config
    from dstrain.launcher.supervisor import Job

    stray = [item for item in args.overrides if "=" not in item]
    if stray:
        raise ConfigError(f"{stray[0]!r}: give one configuration, and overrides as key=value")
    path = args.config.absolute()  # also never begins with a hyphen
    if args.stage == "evaluate":
        _, config = load_run_config(path, args.overrides)
        arguments = ("evaluate", str(path), *args.overrides)
    else:
        config = load_stage_config(args.stage, path, args.overrides)
        arguments = (args.stage, "--config", str(path), *args.overrides)
    layout = _layout(args, config, environment)
    return Job(args.stage, Path(config.run_folder).absolute(), arguments, layout, seed=config.seed)


def _layout(args: argparse.Namespace, config: Any, environment: Mapping[str, str]) -> Layout:
    from dstrain.launcher.hosts import num_processes, read_hostfile
    from dstrain.launcher.starters import Layout

    device: str = config.engine.device
    if args.hostfile is not None:
        if args.starter not in (None, "deepspeed"):
            raise ConfigError(f"--hostfile is read by deepspeed, not by {args.starter}: leave one of the two out")
        hosts = read_hostfile(args.hostfile)
        return Layout("deepspeed", num_processes(hosts), hosts, device)
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    several = environment.get("SLURM_JOB_NUM_NODES", "1") != "1"
    starter: Starter | None = args.starter or ("srun" if nodes and several else None)
    if starter == "srun":
        hosts = _allocation(nodes, args.num_processes, device, environment)
        return Layout("srun", num_processes(hosts), hosts, device)
    processes = args.num_processes or (1 if starter == "python" else _devices(device))
    return Layout(starter or ("deepspeed" if processes > 1 else "python"), processes, device=device)


def _allocation(nodes: str, processes: int | None, device: str, environment: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts of the SLURM allocation, with equal shares of the ranks."""
    from dstrain.base.world import expand_nodelist
    from dstrain.launcher.hosts import Host, check_host

    if not nodes:
        raise ConfigError(
            "--with srun: SLURM_JOB_NODELIST is not set: start it inside an allocation (salloc or sbatch)"
        )
    names = [check_host(name) for name in expand_nodelist(nodes)]
    per_node = environment.get("SLURM_NTASKS_PER_NODE", "")
    total = processes or len(names) * (int(per_node) if per_node.isdigit() else _devices(device))
    if total % len(names):
        raise ConfigError(f"--num-processes {total}: not a multiple of the {len(names)} nodes of the allocation")
    return tuple(Host(name, total // len(names)) for name in names)


def _devices(device: str) -> int:
    """GPUs that this process sees, at least 1."""
    import torch

    return 1 if device == "cpu" else max(1, torch.cuda.device_count())
