"""`dstrain doctor`: is this machine, or are these machines together, fit for a run; one line a check, with the fix in plain words."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ConfigError, DstrainError, ExitCode

if TYPE_CHECKING:
    from dstrain.health.sanity_findings import Finding
    from dstrain.launcher.hosts import Host
    from dstrain.launcher.starters import Layout

_REPORT = "dstrain-doctor-report: "
"""What rank 0's report begins with among the output of launchers and ranks."""
_MARKS = {"ok": "ok     ", "skipped": "skipped", "warning": "WARNING", "failed": "FAILED "}
_EPILOG = """
examples:
  dstrain doctor                                           (this machine)
  dstrain doctor configs/bert-base.yaml --num-processes 8  (its GPUs together, its run folder, its limits)
  dstrain doctor configs/bert-base.yaml --hostfile hosts   (every host: ssh, packages, clocks, shared folder, network, GPUs)
  salloc --nodes=4 dstrain doctor --with srun              (the nodes of a SLURM allocation)

exit codes: 0 nothing failed (warnings may be there), 77 a machine is unfit, 78 the configuration is wrong, 76 no room or a passing
fault. What each line means and what to do: docs/doctor.md
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="is this machine, or are these hosts together, fit for a run, and if not, what to do",
        description="Make the checks that every run makes before its first step, and those of each machine by itself.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="a run's YAML, for its device, folders and limits"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--num-processes", type=int, metavar="N", help="start N ranks and check them together")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`, reached over ssh")
    parser.add_argument(
        "--with", dest="starter", choices=("deepspeed", "torchrun", "srun"), help="the launcher of the ranks"
    )
    parser.add_argument("--folder", type=Path, default=None, metavar="DIR",
                        help="where hosts share a file when there is no CONFIG; default: the current folder")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the configuration")
    parser.set_defaults(run=_run, more_into="overrides")


def _run(args: argparse.Namespace) -> int:
    if args.config is not None and "=" in str(args.config) and not args.config.exists():
        raise ConfigError(f"{str(args.config)!r}: give a configuration before its overrides")
    if args.hostfile is None and args.num_processes is None and args.starter is None:
        return _as_rank(args)
    findings = _together(args)
    _print(findings, as_json=args.json)
    return code_of(findings)


def _as_rank(args: argparse.Namespace) -> int:
    """This process alone, or one rank of several that a launcher has started."""
    from dstrain.base.logs import configure_logs
    from dstrain.base.world import world_from_environment
    from dstrain.cli.training import choose_early, said_once

    world = world_from_environment(local_rank=args.local_rank)
    configure_logs(world, level="ERROR")
    config = said_once(world, lambda: _config(args))
    choose_early(config.engine.device if config is not None else "auto")
    from dstrain.stages.doctor import as_finding, examine

    try:
        findings = examine(config, world, folder=_folder(args))
    except DstrainError as error:
        findings = [as_finding(error)]
    if world.is_first and args.as_rank:
        print(_REPORT + json.dumps([finding.to_json() for finding in findings]), flush=True)
    elif world.is_first:
        _print(findings, as_json=args.json)
    return code_of(findings)


def _together(args: argparse.Namespace) -> list[Finding]:
    """Start ranks as a run would be started, and read what the first one reports."""
    from dstrain.launcher.hosts import read_hostfile

    hosts = read_hostfile(args.hostfile) if args.hostfile is not None else ()
    reached = _reach(hosts)
    if any(finding.level == "failed" for finding in reached):
        return reached  # a launcher over ssh would wait for them
    layout = _layout(args, hosts, _config(args))
    with tempfile.TemporaryDirectory(prefix="dstrain-doctor-") as folder:
        return [*reached, *_start(args, layout, Path(folder))]


def _reach(hosts: Sequence[Host]) -> list[Finding]:
    from dstrain.health.sanity_findings import Finding
    from dstrain.launcher.reachability import ask_hosts

    answers = ask_hosts(hosts)
    bad = [answer for answer in answers if not answer.reached]
    if answers and not bad:
        return [
            Finding(
                "ssh", "ok", f"{len(answers)} host{'s answer' if len(answers) > 1 else ' answers'} without a password"
            )
        ]
    return [
        Finding("ssh", "failed", f"{answer.host}: {answer.why}", answer.fix, hosts=(answer.host,)) for answer in bad
    ]


def _start(args: argparse.Namespace, layout: Layout, folder: Path) -> list[Finding]:
    from dstrain.base.world import free_port
    from dstrain.launcher.attempt import Attempt
    from dstrain.launcher.hosts import render_hostfile
    from dstrain.launcher.policy import RestartPolicy
    from dstrain.launcher.starters import build_command
    from dstrain.launcher.stop_signals import StopSignals

    (folder / "hosts").write_text(render_hostfile(layout.hosts), encoding="utf-8")
    config = () if args.config is None else (str(args.config.absolute()),)
    words = ("doctor", "--as-rank", "--folder", str(_folder(args)), *config, *args.overrides)
    command = build_command(
        layout, words, port=free_port(), hostfile=folder / "hosts" if layout.hosts else None, folder=str(Path.cwd())
    )
    token, log = uuid.uuid4().hex, folder / "log"
    with (
        StopSignals() as stop,
        Attempt(
            command.argv, command.environment(os.environ, token=token), token=token, log=log,
            policy=RestartPolicy(grace_s=5.0), run_folder=folder, local_ranks=0, say=lambda text: None,
        ) as attempt,
    ):  # fmt: skip
        end = attempt.run(stop)
    return report_in(log.read_text(encoding="utf-8", errors="replace"), code=end.launcher_code, starter=layout.starter)


def report_in(output: str, *, code: int, starter: str) -> list[Finding]:
    """The first rank's report, out of what launcher and ranks have printed; their last words where there is none.

    Args:
        output: of all of them.
        code: the launcher's.
        starter: its name.
    """
    from dstrain.health.sanity_findings import Finding

    for line in output.splitlines():
        _, found, report = line.partition(_REPORT)
        if found:
            return [Finding.from_json(data) for data in json.loads(report)]
    said = " | ".join([line.strip() for line in output.splitlines() if line.strip()][-5:])
    text = f"{starter} ended with {code} before the ranks could report: {said[-1500:] or 'it has printed nothing'}"
    return [Finding("start", "failed", text, "mend what it says; `dstrain launch ... --dry-run` shows the command")]


def code_of(findings: Sequence[Finding]) -> int:
    """The exit code: that of the first failed finding, the configuration's before a machine's."""
    failed = sorted((f.code for f in findings if f.level == "failed"), key=lambda code: code != ExitCode.BAD_INPUT)
    return int(failed[0]) if failed else int(ExitCode.COMPLETE)


def text_of(findings: Sequence[Finding]) -> str:
    """For people: one line a check, its fix below, and how it stands."""
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.level]}  {finding.check}: {finding.text}")
        if finding.fix and finding.level in ("warning", "failed"):
            lines.append(f"         what to do: {finding.fix}")
    failed, warnings = (sum(f.level == level for f in findings) for level in ("failed", "warning"))
    verdict = f"{failed} failed, {warnings} to look at" if failed or warnings else "all is well"
    return "\n".join([*lines, verdict]) + "\n"


def _print(findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"code": code_of(findings), "findings": [f.to_json() for f in findings]}, indent=1))
    else:
        sys.stdout.write(text_of(findings))


def _layout(args: argparse.Namespace, hosts: tuple[Host, ...], config: Any) -> Layout:
    import torch

    from dstrain.launcher.allocation import hosts_of
    from dstrain.launcher.hosts import num_processes
    from dstrain.launcher.starters import Layout

    device = config.engine.device if config is not None else "auto"
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if hosts and args.starter not in (None, "deepspeed"):
        raise ConfigError(f"--hostfile is read by deepspeed, not by {args.starter}: leave one of the two out")
    if args.starter == "srun":
        hosts = hosts_of(os.environ, processes=args.num_processes, gpus=gpus, on_cpu=device == "cpu" or not gpus)
    if hosts:
        return Layout(args.starter or "deepspeed", num_processes(hosts), hosts, device)
    processes = args.num_processes if args.num_processes is not None else max(1, gpus)
    return Layout(args.starter or "deepspeed", processes, device=device)


def _config(args: argparse.Namespace) -> Any:
    if args.config is None:
        return None
    from dstrain.base.config import read_yaml
    from dstrain.cli.training import load_stage_config

    stage = "finetune" if "task" in read_yaml(args.config) else "pretrain"
    return load_stage_config(stage, args.config, args.overrides)


def _folder(args: argparse.Namespace) -> Path:
    return Path(args.folder).absolute() if args.folder is not None else Path.cwd()
