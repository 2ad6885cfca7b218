"""`dstrain launch ... --with sbatch`: a stage as a SLURM job, checked as far as a login node can see, shown or submitted."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields, replace

from dstrain.base.errors import ExitCode
from dstrain.cli.launch_stages import StagePlan, say
from dstrain.launcher import plan_text as text
from dstrain.launcher.batch import BatchOptions, batch_command, check_options, script_of, submit
from dstrain.launcher.choice import Choice
from dstrain.launcher.forwarding import forwarded
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.run_files import last_events
from dstrain.launcher.start_checks import check_batch, check_shared
from dstrain.launcher.time_limit import check_grace, check_time_limit, longest_save_s


def batch_options(args: argparse.Namespace) -> BatchOptions:
    """What the arguments say about a job of its own."""
    names = [field.name for field in fields(BatchOptions)]
    return BatchOptions(**{name: getattr(args, name, None) for name in names})  # a stage has those that fit it


def submit_stage(
    args: argparse.Namespace, plan: StagePlan, options: BatchOptions, choice: Choice, policy: RestartPolicy
) -> int:
    """Submit, or show what would be submitted."""
    check_options(options, stage=plan.stage)
    _check_before_a_job(plan, options, policy)
    if plan.stage == "shards" and args.workers > 1:
        options = replace(options, cpus_per_task=args.workers)
    command = batch_command(
        options,
        _for_script(plan),
        stage=plan.stage,
        on_cpu=plan.device == "cpu",
        path=os.environ.get("PATH", os.defpath),
    )
    if args.dry_run:
        script = script_of(options, stage=plan.stage)
        ranks = text.ranks_elsewhere_text(plan.settings) if plan.has_ranks else []
        print(
            text.joined(
                text.command_text(choice, command), text.forwarding_text(os.environ, args.forward, command), ranks,
                text.script_text(str(script), script.read_text(encoding="utf-8")),
            ), end="",
        )  # fmt: skip
        return ExitCode.COMPLETE
    say(f"{choice.way}: {choice.why}")
    job = submit(command, {**forwarded(os.environ, args.forward), **command.added})
    ending = f"; scancel --signal=TERM {job} has it save and requeue itself" if plan.global_batch is not None else ""
    say(f"job {job} is in the queue: squeue --jobs={job}{ending}")
    print(job)
    return ExitCode.COMPLETE


def _for_script(plan: StagePlan) -> list[str]:
    """The script of shards says how many processes itself, from --cpus-per-task."""
    return [word for word in plan.script_arguments if plan.stage != "shards" or not word.startswith("--workers=")]


def _check_before_a_job(plan: StagePlan, options: BatchOptions, policy: RestartPolicy) -> None:
    if not plan.has_ranks:
        return
    check_shared(plan.run_folder, hosts=1 + (options.nodes or 1))  # this machine takes no part
    if plan.global_batch is None:
        return
    save_s = longest_save_s(last_events(plan.run_folder))
    check_grace(policy.grace_s, save_s=save_s)
    limit = options.time or os.environ.get("SBATCH_TIMELIMIT")
    if limit is not None:
        check_time_limit(limit, margin_s=plan.margin_s, save_s=save_s)
    per_node = options.ntasks_per_node or options.num_gpus
    if options.nodes is not None and per_node:
        remark = check_batch(options.nodes * per_node, global_batch=plan.global_batch)
        if remark is not None:
            say(remark)
