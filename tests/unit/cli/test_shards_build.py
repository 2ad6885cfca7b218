"""`dstrain shards build` as a person types it: plan, shares, and refusals. What it builds is in tests/unit/corpus."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError, ExitCode
from dstrain.cli import shards_build


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    shards_build.add_command(parser.add_subparsers())
    args = parser.parse_args([str(part) for part in argv])
    return int(args.run(args))


@pytest.fixture
def arguments(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> list[object]:
    out = tmp_path / "out"
    return ["build", "--input", corpus, "--tokenizer", tokenizer_folder, "--out", out, "--block-tokens", "64"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(arguments, tmp_path, capsys):
    assert run(*arguments, "--workers", "4", "--dry-run") == ExitCode.COMPLETE
    shown = capsys.readouterr().out
    for line in ("stories.jsonl", "hash buckets", "4 processes", "free: enough", "nothing was written"):
        assert line in shown
    assert list(tmp_path.iterdir()) == []


def test_the_summary_counts_what_was_dropped_and_how_fast(arguments, capsys):
    assert run(*arguments, "--min-words", "12") == ExitCode.COMPLETE
    shown = capsys.readouterr().out
    assert "too_few_words" in shown
    assert "Mtok/s per core" in shown


def test_shares_of_an_array_end_in_one_output(arguments, tmp_path, capsys, monkeypatch):
    assert run(*arguments, "--task-index", "0", "--num-tasks", "1") == ExitCode.COMPLETE
    assert "train" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")
    assert run(*arguments, "--executor", "array") == ExitCode.COMPLETE
    assert "nothing to do" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--task-index", "1"), "--num-tasks"),
        (("--task-index", "3", "--num-tasks", "2"), "from 0 to 1"),
        (("--task-index", "0", "--num-tasks", "2", "--executor", "ray"), "belong to --executor array"),
        (("--workers", "0"), "workers"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, extra, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments, *extra)
