"""The end of a process, as its parent sees it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from dstrain.cli import main as cli
{imports}

def command(argv=None):
    atexit.register(print, "an exit function")
    {body}

cli.main = command
{entry}
"""


def ended(
    body: str, *, imports: str = "", entry: str = "cli.entry()", **kwargs: object
) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(body=body, imports=imports, entry=entry)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, **kwargs
    )  # type: ignore[call-overload]


@pytest.mark.parametrize("entry", ["cli.entry()", "cli.stage_entry('pretrain')"])
def test_a_thread_that_is_inside_of_torch_does_not_turn_a_good_end_into_an_abort(entry: str) -> None:
    """Seen as "terminate called without an active exception" and code -6 at the end of runs at stage 3."""
    busy = """
def work():
    while True:
        torch.ones(200_000).sum()
"""
    body = "[threading.Thread(target=work, daemon=True).start() for _ in range(3)]; time.sleep(0.5); return 75"
    end = ended(body, imports=f"import torch{busy}", entry=entry)
    assert (end.returncode, end.stdout, end.stderr) == (75, "an exit function\n", "")


@pytest.mark.parametrize(
    ("body", "code"),
    [("return 0", 0), ("sys.exit(2)", 2), ("sys.exit('why')", 1), ("sys.exit()", 0), ("raise ValueError('why')", 1)],
)
def test_the_code_is_the_one_that_python_would_have_left_with(body: str, code: int) -> None:
    end = ended(body)
    assert (end.returncode, end.stdout) == (code, "an exit function\n")
    assert ("why" in end.stderr) == ("why" in body)


def test_threads_that_are_to_be_waited_for_are() -> None:
    end = ended("threading.Thread(target=lambda: (time.sleep(0.3), print('done'))).start(); return 0")
    assert (end.returncode, end.stdout) == (0, "done\nan exit function\n")


def test_output_whose_reader_has_left_changes_no_code() -> None:
    end = ended("import os; print('x' * 10); os.close(1); return 3")
    assert end.returncode == 3
