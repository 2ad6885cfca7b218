"""The head of a result file: what was measured, when, on which commit, machine, versions, by which command.

    facts = Facts.now(__file__, packages=("dstrain", "numpy"), interpreters={"mosaicml-streaming": "peers/bin/python"})
    print(facts.text())

Every benchmark of this folder that writes a result begins it with this, so that a figure can be traced and measured again.
Says nothing about the figures. Paths of the command are shown relative to the folder it was started in.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata as metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Facts:
    """Where a result comes from."""

    date: str
    """UTC, ISO."""
    command: str
    """As a shell takes it, from the repository's root."""
    commit: str
    """Ten digits of the commit that is checked out."""
    is_modified: bool
    """Whether files that git tracks differ from that commit."""
    processor: str
    cores: int
    """That this process may use."""
    memory_gib: float
    load: float
    """Average of the last minute when the head was made: above zero before a run, others were at work too."""
    system: str
    python: str
    versions: dict[str, str]
    inputs: dict[str, str]
    """SHA-256 of each input file, by name."""

    @classmethod
    def now(
        cls,
        script: str,
        *,
        packages: Sequence[str],
        interpreters: Mapping[str, str] | None = None,
        inputs: Sequence[str | Path] = (),
    ) -> Facts:
        """Look around; call it before the first measurement, so that the load is that of others.

        Args:
            script: the benchmark's own `__file__`.
            packages: whose versions to ask of this interpreter.
            interpreters: packages that live elsewhere, with the interpreter that has them.
            inputs: files that were read.
        """
        found = {name: _version(name) for name in packages}
        found |= {name: _version_of(python, name) for name, python in (interpreters or {}).items()}
        return cls(
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            command=shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *map(_relative, sys.argv[1:])]),
            commit=_git("rev-parse", "--short=10", "HEAD") or "unknown",
            is_modified=bool(_git("status", "--porcelain", "--untracked-files=no")),
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            load=round(os.getloadavg()[0], 1),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            versions=found,
            inputs={Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in inputs},
        )  # fmt: skip

    def text(self) -> str:
        """The head as Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        state = ", with changes that are not committed" if self.is_modified else ""
        lines = [
            "```", self.command, "```", "",
            f"{self.date}, commit {self.commit}{state}; {self.processor}, {self.cores} cores, {self.memory_gib:g} GiB, {self.system}; "
            f"load average {self.load:g} at the start.",
            f"Python {self.python}; {versions}.",
        ]  # fmt: skip
        if self.inputs:
            lines.append(
                "Inputs (SHA-256): " + ", ".join(f"{n} {digest[:12]}" for n, digest in self.inputs.items()) + "."
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _relative(argument: str) -> str:
    """An argument with paths below the present folder made relative."""
    return argument.replace(f"{os.getcwd()}/", "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _version_of(python: str, name: str) -> str:
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, name], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
