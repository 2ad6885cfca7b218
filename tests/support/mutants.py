"""Seeded bugs: change a few words of dstrain's source, run one named test of the suite, and see whether it notices.

A bug inside one process is put into a fork of this process: the changed source is compiled, and the functions get their new
code objects, wherever they have been imported already. A bug that real runs must show is put into a copy of the tree, whose
tests then run in an interpreter of their own. Nothing of the real tree is ever changed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.support.runs import ROOT

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


def run_in_fork(test: str, out: Path, mutant: Mutant | None = None) -> Verdict:
    """Run a test in a copy of this process, with a bug or without."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)
            if mutant is not None:
                _infect(mutant)
            os.environ.pop("PYTEST_CURRENT_TEST", None)
            code = int(pytest.main([*_QUIET, f"--rootdir={ROOT}", f"{ROOT}/tests/{test}"]))
        except BaseException:  # noqa: BLE001 - nothing of the test process may go on in this copy of it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return Verdict(_reap(pid), out.read_text(errors="replace"))


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


def _reap(pid: int) -> int:
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a test did not end within {_LIMIT_S:.0f} s")


def _infect(mutant: Mutant) -> None:
    """Give the functions of a module the code of its changed source."""
    module = importlib.import_module(mutant.module)
    path = str(module.__file__)
    sound = dict(_codes(compile(Path(path).read_text(), path, "exec", dont_inherit=True)))
    changed = dict(_codes(compile(changed_source(mutant), path, "exec", dont_inherit=True)))
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
