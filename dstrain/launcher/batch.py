"""A stage as a SLURM batch job: options checked, sbatch's argument list built, the job submitted.

What is submitted are the scripts of `slurm/` themselves (`batch_scripts/` here), with options on the command line, which win over
their `#SBATCH` lines. So there is one text to read, copy and edit, and no text is made out of values. `--script` takes an edited copy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dstrain.base.errors import ConfigError, StorageError
from dstrain.launcher.starters import Command, check_word
from dstrain.launcher.time_limit import parse_time_limit, signal_option

SCRIPTS = Path(__file__).parent / "batch_scripts"
_SCRIPT_OF = {
    "shards": "build_shards",
    "pretrain": "pretrain",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "export": "export",
}
_PATIENCE_S = 60.0
_LIMIT_BYTES = 4 << 20  # SLURM's own limit of a script

_ITEM = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
_FORMS = {
    "--job-name": (re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,63}", re.ASCII), "letters, digits and ._+=-, at most 64"),
    "--partition": (re.compile(rf"{_ITEM}(,{_ITEM})*", re.ASCII), "a name, or several with commas"),
    "--account": (re.compile(_ITEM, re.ASCII), "a name of letters, digits and ._+-"),
    "--gpus-per-node": (
        re.compile(r"([A-Za-z][A-Za-z0-9._-]{0,63}:)?\d{1,3}", re.ASCII),
        "a number, or one type and a number such as a100:8; GPUs of different types in one run do not give the same bits",
    ),
    "--array": (
        re.compile(r"\d{1,6}(-\d{1,6}(:\d{1,6})?)?(,\d{1,6}(-\d{1,6}(:\d{1,6})?)?)*(%\d{1,6})?", re.ASCII),
        "such as 0-15, or 0-63%8 for eight at a time",
    ),
    "--dependency": (
        re.compile(
            r"(singleton|(after|afterany|aftercorr|afternotok|afterok)(:\d{1,10}(_\d{1,6})?(\+\d{1,6})?)+)"
            r"([,?](singleton|(after|afterany|aftercorr|afternotok|afterok)(:\d{1,10}(_\d{1,6})?(\+\d{1,6})?)+))*",
            re.ASCII,
        ),
        "such as afterok:4711, or singleton",
    ),
}


@dataclass(frozen=True)
class BatchOptions:
    """What a user may say about the job; everything else is in the script, or in sbatch's own variables (SBATCH_QOS, ...)."""

    nodes: int | None = None
    gpus_per_node: str | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    job_name: str | None = None
    array: str | None = None
    dependency: str | None = None
    script: Path | None = None

    def given(self) -> tuple[str, ...]:
        """The options that were given, as they are typed."""
        return tuple(f"--{name.replace('_', '-')}" for name, value in self.__dict__.items() if value is not None)

    @property
    def num_gpus(self) -> int | None:
        """GPUs of a node; None where the script says it."""
        return None if self.gpus_per_node is None else int(self.gpus_per_node.rpartition(":")[2])


def check_options(options: BatchOptions, *, stage: str) -> BatchOptions:
    """Return options that are safe words of a command and fit the stage.

    Raises:
        ConfigError: naming the option, the value and its form.
    """
    for option in ("nodes", "ntasks_per_node", "cpus_per_task"):
        value = getattr(options, option)
        if value is not None and not 1 <= value <= 100_000:
            raise ConfigError(f"--{option.replace('_', '-')} {value}: at least 1")
    for option, (form, meaning) in _FORMS.items():
        value = getattr(options, option[2:].replace("-", "_"))
        if value is not None and form.fullmatch(value) is None:
            raise ConfigError(f"{option} {value[:80]!r}: {meaning}")
    if options.time is not None:
        parse_time_limit(options.time)
    if options.array is not None and stage != "shards":
        raise ConfigError(f"--array: only shards are built by an array; {stage} takes --nodes")
    if stage in ("shards", "export") and (options.nodes or 1) > 1:
        raise ConfigError(f"--nodes {options.nodes}: {stage} is no job of several nodes; shards take --array")
    return options


def script_of(options: BatchOptions, *, stage: str) -> Path:
    """The script that is submitted.

    Raises:
        ConfigError: `--script` is no readable text file with a `#!` line.
    """
    if options.script is None:
        return SCRIPTS / f"{_SCRIPT_OF[stage]}.sbatch"
    path = options.script.absolute()
    try:
        if path.stat().st_size > _LIMIT_BYTES or not path.read_text(encoding="utf-8").startswith("#!"):
            raise ConfigError(f"--script {path}: not a batch script: it begins with #!/usr/bin/env bash")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--script {path}: cannot be read: {error}") from None
    return path


def batch_command(
    options: BatchOptions, arguments: Sequence[str], *, stage: str, on_cpu: bool, path: str, sbatch: str = "sbatch"
) -> Command:
    """The command that submits a stage.

    Args:
        options: see `check_options`.
        arguments: of the script.
        stage: what runs.
        on_cpu: the run uses no GPU: the script's are not asked for.
        path: PATH of this process; this interpreter's folder goes in front, so that the job finds the same `dstrain`.
        sbatch: the program.

    Raises:
        ConfigError: a value that cannot be passed on safely.
    """
    options = _completed(check_options(options, stage=stage), stage=stage, on_cpu=on_cpu)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.__dict__.items()
             if value is not None and name != "script"]  # fmt: skip
    if options.time is not None and stage in ("pretrain", "finetune"):
        words += [word] if (word := signal_option(options.time)) else []
    script = script_of(options, stage=stage)
    arguments = [check_word(word) for word in arguments]
    here = str(Path(sys.executable).parent)
    added = {"PATH": path if path.split(":")[0] == here else f"{here}:{path}"}
    return Command((sbatch, "--parsable", *words, str(script), *arguments), added, ())


def submit(command: Command, environment: Mapping[str, str]) -> str:
    """Put it into the queue; returns the job's number.

    Raises:
        ConfigError: sbatch refused it, in sbatch's words.
        StorageError: no answer: the controller may be down, and another try may work.
    """
    program = shutil.which(command.argv[0])
    if program is None:
        raise ConfigError("--with sbatch: sbatch is not on PATH: start this on a login node of the cluster")
    try:
        done = subprocess.run(
            [program, *command.argv[1:]], env=dict(environment), capture_output=True, text=True, timeout=_PATIENCE_S,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise StorageError(f"sbatch: no answer: {error}") from None
    said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused the job: {said or f'code {done.returncode}'}")
    number = done.stdout.strip().split(";")[0]  # a multi-cluster answer has the cluster's name behind it
    if not number.isdecimal():
        raise StorageError(f"sbatch: an answer without a job number: {done.stdout[:80]!r}")
    return number


def _completed(options: BatchOptions, *, stage: str, on_cpu: bool) -> BatchOptions:
    """One rank for each GPU; and no GPU for a run that uses none, where the script asks for some."""
    if stage in ("shards", "export"):
        return options
    gpus = options.num_gpus
    if on_cpu and gpus is None:
        options = replace(options, gpus_per_node="0")
    if options.ntasks_per_node is None and gpus:
        options = replace(options, ntasks_per_node=gpus)
    return options
