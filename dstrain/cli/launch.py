"""`dstrain launch STAGE ...`: start a stage the way that fits here, and start it again until it is complete or not worth it."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

_SUMMARIES = {
    "pretrain": "pretrain on shards",
    "finetune": "fine-tune on a task",
    "evaluate": "score a run's checkpoint",
    "shards": "build shards: by processes here, or by a SLURM array",
    "export": "write a run as a Hugging Face folder",
}
_EXAMPLES = {
    "pretrain": """
  dstrain launch pretrain configs/bert-base.yaml --num-processes 8 --max-restarts 20
  dstrain launch pretrain configs/bert-base.yaml --hostfile hosts --min-processes 24 data.path=/data/shards
  dstrain launch pretrain configs/bert-base.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00      (a SLURM job)
  dstrain launch pretrain configs/bert-base.yaml --nodes 4 --dry-run      (print all of it, start nothing)""",
    "finetune": """
  dstrain launch finetune configs/finetune/sst2.yaml --with torchrun --num-processes 4""",
    "evaluate": """
  dstrain launch evaluate runs/bert-base --step 1000""",
    "shards": """
  dstrain launch shards --input 'corpus/*.jsonl.gz' --tokenizer tok/ --out shards/ --array 0-15   (a SLURM array)
  dstrain launch shards shards.yaml --workers 8      (the same names in a file, processes of this machine)""",
    "export": """
  dstrain launch export runs/bert-base --out hf/""",
}
_NOTES = {
    "shards": "\n\nStarted here, a build has its history and logs in .launch-NAME beside --out. As an array, each element has its log.",
}
_EPILOG = f"""
examples:{"".join(_EXAMPLES.values())}

The way is chosen by where this is, and said in one line: srun in an allocation of several nodes; sbatch on a login node, where
options of a job are given or `engine.device: cuda` finds no GPU; deepspeed for a hostfile or several processes; else python.

Restarts the real launcher from the newest valid checkpoint when ranks crash or are killed, and cleans up what it started
and nothing else. Stops when the run is complete (0), was asked to stop and has saved (75, 82), cannot go on (78, 80, 81),
or makes no progress three times in a row (79; the last time from one checkpoint further back). SIGTERM, SIGINT, SIGUSR1
and SIGUSR2 reach the ranks, which save and leave; what SLURM sends to the ranks of srun itself counts the same. History:
supervisor.json in the run folder; output: logs/attempt-*.log, under srun one more for each rank.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `launch` and its stages."""
    parser = subparsers.add_parser(
        "launch",
        help="start a stage under a launcher or as a SLURM job, and restart it after failures",
        description="Start a stage under python, deepspeed, torchrun or srun, supervise it and restart it after failures; or "
        "submit all that as a SLURM job.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = parser.add_subparsers(title="stages", dest="stage", required=True, metavar="STAGE")
    for stage, summary in _SUMMARIES.items():
        one = stages.add_parser(
            stage, help=summary, description=f"{summary[0].upper()}{summary[1:]}; see also dstrain launch --help.",
            epilog=f"examples:{_EXAMPLES[stage]}{_NOTES.get(stage, '')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        _add_subject(one, stage)
        _add_start(one, stage)
        _add_batch(one, stage)
        one.set_defaults(run=_run, stage=stage, overrides=[])
        if stage in ("pretrain", "finetune", "evaluate"):
            one.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the configuration")
            one.set_defaults(more_into="overrides")


def _add_subject(parser: argparse.ArgumentParser, stage: str) -> None:
    """What the stage works on."""
    if stage == "shards":
        from dstrain.cli.shards_build import add_build_arguments

        parser.add_argument(
            "config",
            nargs="?",
            type=Path,
            metavar="YAML",
            help="the options below as `text_field: body`, `input: [...]`",
        )
        add_build_arguments(parser, required=False)
        return
    of_run = stage in ("evaluate", "export")
    parser.add_argument(
        "config",
        type=Path,
        metavar="RUN" if of_run else "CONFIG",
        help="the run folder" if of_run else "the run's YAML",
    )
    if of_run:
        parser.add_argument("--step", type=int, help="checkpoint; default: the best by metric, else the newest")
        parser.add_argument("--average", metavar="last:K", help="the mean of the K newest checkpoints (up to --step)")
    if stage == "export":
        parser.add_argument("--out", type=Path, help="folder to write; default: export/ in the run folder")
        parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _add_start(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("how it is started")
    single = stage in ("shards", "export")
    ways = ("python", "sbatch") if single else ("python", "deepspeed", "torchrun", "srun", "sbatch")
    group.add_argument("--with", dest="starter", choices=ways, help="default: what fits here (dstrain launch --help)")
    group.add_argument("--max-restarts", type=int, metavar="N", help="restarts in all (default 10)")
    group.add_argument(
        "--grace", type=float, metavar="SECONDS", help="time to save and leave when asked to stop (default 120)"
    )
    group.add_argument(
        "--forward", action="append", default=[], metavar="NAME", help="a variable of this shell that the job gets too"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print exact commands, environment and batch script; start nothing"
    )
    ranks = group if not single else None
    if ranks is None:
        parser.set_defaults(
            num_processes=None,
            hostfile=None,
            min_processes=None,
            bind=None,
            interface=None,
            port=None,
            unhealthy_hosts=None,
        )
        return
    where = ranks.add_mutually_exclusive_group()
    where.add_argument("--num-processes", type=int, metavar="N", help="ranks; default: one for each GPU, or one")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`, for deepspeed over ssh")
    ranks.add_argument(
        "--min-processes",
        type=int,
        metavar="K",
        help="leave unhealthy hosts out as long as this many ranks remain; default: never",
    )
    ranks.add_argument(
        "--bind", choices=("auto", "cores", "numa", "none"), help="cores of a rank: engine.bind (default auto)"
    )
    ranks.add_argument("--interface", metavar="NAME", help="network interface of NCCL and gloo: engine.interface")
    ranks.add_argument("--port", type=int, metavar="N", help="where ranks meet; default: a free one at each start")
    ranks.add_argument("--unhealthy-hosts", type=Path, metavar="FILE",
                       help="write the hosts that code 77 is about there, separated by commas, as scontrol takes them")  # fmt: skip


def _add_batch(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group(
        "a SLURM job of its own (--with sbatch; what is not given is in the script, or in SBATCH_QOS and the like)"
    )
    if stage in ("pretrain", "finetune", "evaluate"):
        group.add_argument("--nodes", type=int, metavar="N", help="nodes")
        group.add_argument("--gpus-per-node", metavar="[TYPE:]N", help="GPUs of a node, and as many ranks")
        group.add_argument(
            "--ntasks-per-node", type=int, metavar="N", help="ranks of a node; default: one for each GPU"
        )
        group.add_argument("--cpus-per-task", type=int, metavar="N", help="CPUs of a rank")
    if stage == "shards":
        group.add_argument(
            "--array", metavar="0-15", help="elements of the array; more of them are better than more CPUs for each"
        )
    group.add_argument("--time", metavar="D-H:M:S", help="time limit of one job")
    group.add_argument("--partition", metavar="NAME", help="partition")
    group.add_argument("--account", metavar="NAME", help="account")
    group.add_argument("--job-name", metavar="NAME", help="name; jobs of one name are a chain with --singleton")
    after = group.add_mutually_exclusive_group()
    after.add_argument("--dependency", metavar="afterok:JOB", help="start after other jobs")
    after.add_argument(
        "--singleton",
        dest="dependency",
        action="store_const",
        const="singleton",
        help="start after earlier jobs of this name",
    )
    group.add_argument("--script", type=Path, metavar="FILE", help="an edited copy of the script in slurm/")


def _run(args: argparse.Namespace) -> int:
    from dstrain.base.config import validate
    from dstrain.cli.launch_batch import batch_options, submit_stage
    from dstrain.cli.launch_here import start_stage
    from dstrain.cli.launch_stages import read_stage, say
    from dstrain.launcher.allocation import num_nodes
    from dstrain.launcher.choice import Situation, choose
    from dstrain.launcher.forwarding import check_forward
    from dstrain.launcher.policy import RestartPolicy

    for name in args.forward:
        check_forward(name)
    given = {"max_restarts": args.max_restarts, "min_processes": args.min_processes, "grace_s": args.grace}
    given = {name: value for name, value in given.items() if value is not None}
    policy = validate(RestartPolicy, given, source="dstrain launch")
    plan, options = read_stage(args), batch_options(args)
    has_sbatch = shutil.which("sbatch") is not None
    if not has_sbatch and args.dry_run and (args.starter == "sbatch" or options.given()):
        say("sbatch is not on PATH here; this is what a login node would submit")
        has_sbatch = True
    gpus = _gpus() if plan.has_ranks and plan.device != "cpu" else 0
    choice = choose(
        Situation(
            plan.stage, args.starter, args.hostfile is not None, args.num_processes, options.given(),
            wants_gpus=plan.device == "cuda", cpu_only=plan.device == "cpu", gpus=gpus, allocation=num_nodes(os.environ),
            has_sbatch=has_sbatch,
        )
    )  # fmt: skip
    if choice.way == "sbatch":
        return submit_stage(args, plan, options, choice, policy)
    return start_stage(args, plan, choice, policy, gpus)


def _gpus() -> int:
    """GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()
