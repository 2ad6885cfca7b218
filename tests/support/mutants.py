"""Seeded bugs: change a few words of dstrain's source, run one named test of the suite, and see whether it notices.

A bug inside one process is put into a fork of the zygote: the changed source is compiled, and the functions get their new
code objects, wherever they have been imported already. A bug that real runs must show is put into a copy of the tree, whose
tests then run in an interpreter of their own. Nothing of the real tree is ever changed.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.support.runs import ROOT
from tests.support.zygote import Zygote

_QUIET = (
    "-q",
    "-x",
    "--no-header",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=--import-mode=importlib --timeout=250",
)
_LIMIT_S = 280.0


@dataclass(frozen=True)
class Mutant:
    """One bug and the test that must notice it."""

    bug: str
    """What somebody might have written, in words."""
    module: str
    changes: tuple[tuple[str, str], ...]
    """(text that stands in the module exactly once, what stands there instead)."""
    test: str
    """Node id below tests/."""


@dataclass(frozen=True)
class Verdict:
    """How a test ended."""

    code: int
    """pytest's exit code: 0 passed, 1 failed, anything else is a defect of the mutant or the test."""
    output: str


def changed_source(mutant: Mutant) -> str:
    """The module's source with the bug; raises AssertionError when the code has moved on."""
    source = (ROOT / (mutant.module.replace(".", "/") + ".py")).read_text()
    for old, new in mutant.changes:
        assert source.count(old) == 1, f"{mutant.module} has {source.count(old)} times: {old!r}"
        source = source.replace(old, new)
    return source


def run_in_fork(zygote: Zygote, test: str, folder: Path, mutant: Mutant | None = None) -> Verdict:
    """Run a test in a fresh process that has the imports behind it, with a bug or without."""
    changes = None if mutant is None else [mutant.module, changed_source(mutant)]
    job = zygote.start_module("tests.support.mutants", test, json.dumps(changes), log_folder=folder, world_size=1)
    with job:
        code = job.wait(_LIMIT_S)[0]
        return Verdict(code, job.logs[0].read_text(errors="replace"))


def run_in_copy(mutant: Mutant | None, test: str, folder: Path) -> Verdict:
    """Run a test in a copy of the tree, so that every process it starts has the bug."""
    for name in ("dstrain", "tests", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutant is not None:
        (folder / (mutant.module.replace(".", "/") + ".py")).write_text(changed_source(mutant))
    command = [sys.executable, "-m", "pytest", *_QUIET, f"tests/{test}"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S
    )
    return Verdict(done.returncode, done.stdout + done.stderr)


def _infect(name: str, source: str) -> None:
    """Give the functions of a module the code of another source."""
    module = importlib.import_module(name)
    path = str(module.__file__)
    sound = dict(_codes(compile(Path(path).read_text(), path, "exec", dont_inherit=True)))
    changed = dict(_codes(compile(source, path, "exec", dont_inherit=True)))
    found = {function.__qualname__: function for function in _functions(module)}
    different = {name for name in found.keys() & sound.keys() if _essence(sound[name]) != _essence(changed[name])}
    assert different, "the change changes no function"
    for name in different:
        found[name].__code__ = changed[name]


def _codes(code: CodeType, prefix: str = "") -> Iterator[tuple[str, CodeType]]:
    """(qualified name, code) of everything inside a module's code."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            name = prefix + inner.co_name
            yield name, inner
            yield from _codes(inner, f"{name}.<locals>." if inner.co_flags & inspect.CO_OPTIMIZED else f"{name}.")


def _essence(code: CodeType) -> Any:
    """What a code object does, wherever it stands in its file."""
    constants = tuple(_essence(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, repr(constants)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for member in vars(value).values() if isinstance(value, type) else (value,):
            plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            plain = inspect.unwrap(plain) if callable(plain) else plain
            if isinstance(plain, FunctionType):
                yield plain


if __name__ == "__main__":
    node, given = sys.argv[1], json.loads(sys.argv[2])
    if given is not None:
        _infect(*given)
    sys.exit(pytest.main([*_QUIET, f"--rootdir={ROOT}", f"{ROOT}/tests/{node}"]))
