"""`dstrain launch` on this machine or from it: checked before anything is started, shown, or started and supervised."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dstrain.base.errors import ExitCode
from dstrain.base.privacy import make_private
from dstrain.base.storage import write_text
from dstrain.base.world import free_port
from dstrain.cli.launch_stages import StagePlan, say
from dstrain.launcher import plan_text as text
from dstrain.launcher import supervisor
from dstrain.launcher.allocation import ask_gpu_types, check_gpu_types, cpus_per_rank, hosts_of
from dstrain.launcher.choice import Choice
from dstrain.launcher.forwarding import forwarded
from dstrain.launcher.history import read_history
from dstrain.launcher.hosts import check_host, is_this_machine, num_processes, read_hostfile
from dstrain.launcher.node_view import interfaces, look_at_node
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.rank_environment import check_interface
from dstrain.launcher.run_files import LOGS, last_events
from dstrain.launcher.start_checks import (
    check_batch,
    check_deepspeed_environment,
    check_gpus,
    check_port,
    check_shared,
)
from dstrain.launcher.starters import Layout, build_command
from dstrain.launcher.supervisor import Job
from dstrain.launcher.time_limit import check_grace, longest_save_s


def start_stage(args: argparse.Namespace, plan: StagePlan, choice: Choice, policy: RestartPolicy, gpus: int) -> int:
    """Start and supervise, or show what would be started."""
    layout = _layout(args, plan, choice, gpus, os.environ)
    _check_before_a_start(args, plan, layout, policy, gpus)
    job = Job(plan.stage, plan.run_folder, plan.arguments, layout, seed=plan.seed, port=args.port)
    environment = forwarded(os.environ, args.forward)
    if args.dry_run:
        print(_shown(args, plan, choice, policy, job), end="")
        return ExitCode.COMPLETE
    hostfile = job.run_folder / "hosts" if layout.hosts else None
    # Refuses what cannot be started before anything is made.
    build_command(layout, job.arguments, port=1, hostfile=hostfile, folder=str(Path.cwd()))
    say(f"{choice.way}: {choice.why}")
    if plan.has_ranks:  # shards and exports are for others too; their logs are private anyway
        make_private(job.run_folder)
    code = supervisor.Supervisor(job, policy, say=say, out=sys.stdout.buffer, environment=environment).run()
    if args.unhealthy_hosts is not None:
        _write_unhealthy_hosts(args.unhealthy_hosts, job.run_folder if code == ExitCode.UNHEALTHY_NODE else None)
    return int(code)


def _shown(args: argparse.Namespace, plan: StagePlan, choice: Choice, policy: RestartPolicy, job: Job) -> str:
    """The text of --dry-run."""
    layout = job.layout
    logs = job.run_folder / LOGS / "attempt-0001"
    hostfile = job.run_folder / LOGS / "hosts-0001" if layout.hosts else None
    command = build_command(
        layout, job.arguments, port=job.port or free_port(), hostfile=hostfile, folder=str(Path.cwd()), rank_logs=logs
    )
    environment = command.environment(forwarded(os.environ, args.forward), token="")
    ranks: list[str] = []
    if plan.has_ranks and layout.hosts:
        ranks = text.ranks_elsewhere_text(plan.settings)
    elif plan.has_ranks:
        ranks = text.ranks_here_text(
            plan.settings,
            launcher=choice.way,
            processes=layout.processes,
            node=look_at_node(environment),
            environment=environment,
        )
    return text.joined(
        text.command_text(choice, command),
        text.forwarding_text(os.environ, args.forward, command),
        ranks,
        text.policy_text(policy),
    )


def _layout(
    args: argparse.Namespace, plan: StagePlan, choice: Choice, gpus: int, environment: Mapping[str, str]
) -> Layout:
    way = choice.way
    assert way != "sbatch"  # submitted, not started
    if args.hostfile is not None:
        hosts = read_hostfile(args.hostfile)
        return Layout(way, num_processes(hosts), hosts, plan.device)
    if way == "srun":
        on_cpu = plan.device == "cpu"
        hosts = hosts_of(environment, processes=args.num_processes, gpus=gpus, on_cpu=on_cpu)
        if not on_cpu:
            check_gpu_types(ask_gpu_types(environment.get("SLURM_JOB_ID", "")))
        cpus = cpus_per_rank(environment, slots=hosts[0].slots)
        return Layout(way, num_processes(hosts), hosts, plan.device, cpus)
    processes = args.num_processes if args.num_processes is not None else 1 if way == "python" else max(1, gpus)
    return Layout(way, processes, device=plan.device)


def _check_before_a_start(
    args: argparse.Namespace, plan: StagePlan, layout: Layout, policy: RestartPolicy, gpus: int
) -> None:
    check_shared(plan.run_folder, hosts=len(layout.hosts))
    if layout.hosts and layout.starter == "deepspeed":
        check_deepspeed_environment(os.environ, folder=Path.cwd())
    if args.port is not None:
        check_port(args.port, listens_here=not layout.hosts or is_this_machine(layout.hosts[0].name))
    if not layout.hosts and plan.has_ranks:
        if plan.settings.interface is not None:
            check_interface(plan.settings.interface, interfaces())
        check_gpus(
            layout.processes, gpus=gpus, wants_gpus=plan.device == "cuda" or (plan.device == "auto" and gpus > 0)
        )
    if plan.global_batch is not None:
        check_grace(policy.grace_s, save_s=longest_save_s(last_events(plan.run_folder)))
        remark = check_batch(layout.processes, global_batch=plan.global_batch)
        if remark is not None:
            say(remark)


def _write_unhealthy_hosts(path: Path, run_folder: Path | None) -> None:
    hosts = read_history(run_folder)[-1].hosts_at_fault if run_folder is not None else ()
    write_text(path, ",".join(check_host(host) for host in hosts) + "\n")
