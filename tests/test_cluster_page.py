"""docs/clusters.md and the tests on the virtual cluster: each command of the page is run by one of them, or says why it is not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import cluster_page
from tests.support.cluster_page import page_command, page_line, page_lines
from tests.support.runs import ROOT

SOURCES = [*sorted((ROOT / "tests/cluster").glob("*.py")), ROOT / "tests/support/slurm_runs.py"]
READERS = {"page_line", "page_command", "_looked_at"}
"""Functions that take a line of the page by its beginning."""

NOT_RUN = {
    "git clone ...": "from a server",
    "make venv": "the tests run in the environment that it makes",
    "source .venv/bin/activate": "the tests put its folder onto the path instead",
    "tail -f pretrain-JOB.log": "does not end by itself",
}
"""Lines of the page that no test runs, by their beginning."""


def _beginnings() -> list[str]:
    """First words that the tests take lines of the page by."""
    found = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
                found += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return found


def test_every_command_of_the_page_is_run_by_a_test_or_says_why_not() -> None:
    known = [*_beginnings(), *NOT_RUN]
    unknown = [line for line in page_lines() if not any(line.startswith(start) for start in known)]
    assert unknown == [], "run it in tests/cluster through page_command, or give the reason in NOT_RUN"
    assert len(page_lines()) >= 20


@pytest.mark.parametrize("start", [*sorted(set(_beginnings())), *NOT_RUN])
def test_what_the_tests_take_from_the_page_is_there(start: str) -> None:
    assert page_line(start).startswith(start)


def test_words_are_changed_as_wholes_and_only_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```\nrun 'a b' --n=1 \\\n    shards/   # why\n\nother\n```\nrun this too\n```\nlast\n```\n")
    monkeypatch.setattr(cluster_page, "PAGE", page)
    assert page_lines() == ["run 'a b' --n=1      shards/", "other", "last"]
    assert page_command("run", {"--n=1": "--n=2"}) == ["run", "a b", "--n=2", "shards/"]
    with pytest.raises(AssertionError, match="--n"):
        page_command("run", {"--n": "--n=2"})
    with pytest.raises(AssertionError, match="0 lines"):
        page_line("absent")
