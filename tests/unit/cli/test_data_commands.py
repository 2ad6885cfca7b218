"""`dstrain tokenizer` and `dstrain shards` as a person types them, in this process."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError, DataError, ExitCode
from dstrain.cli import shards, tokenizer


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for module in (tokenizer, shards):
        module.add_parser(subparsers)
    args = parser.parse_args([str(part) for part in argv])
    return int(args.run(args))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a tokenizer and shards made by the commands."""
    folder = tmp_path_factory.mktemp("work")
    words = "red green blue one two three four".split()
    rows = [{"body": f"{k} " + " ".join(words[(k * j) % 7] for j in range(1, 20))} for k in range(60)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ("--input", str(folder / "*.jsonl"), "--text-field", "body")
    assert run("tokenizer", "train", *text, "--vocab-size", "100", "--out", folder / "tok") == 0
    assert run("shards", "build", *text, "--tokenizer", folder / "tok", "--out", folder / "shards") == 0
    return folder


def test_inspect_shows_counts_and_text(work, capsys):
    assert run("shards", "inspect", work / "shards") == ExitCode.COMPLETE
    shown = capsys.readouterr().out
    assert "59 in 1 blocks" in shown
    assert "matches" in shown
    assert "red" in shown
    with pytest.raises(ConfigError, match="--samples: must be 0 or more, got -1"):
        run("shards", "inspect", work / "shards", "--samples", "-1")
    assert run("shards", "inspect", work / "shards" / "train", "--json") == ExitCode.COMPLETE
    assert list(json.loads(capsys.readouterr().out)["splits"]) == ["train"]


def test_the_same_commands_again_say_there_is_nothing_to_do(work, capsys):
    text = ("--input", str(work / "c.jsonl"), "--text-field", "body")
    assert run("tokenizer", "train", *text, "--vocab-size", "100", "--out", work / "tok") == 0
    assert run("shards", "build", *text, "--tokenizer", work / "tok", "--out", work / "shards") == 0
    assert capsys.readouterr().err.count("nothing to do") == 2


def test_verify_tells_sound_from_damaged_by_exit_code(work, tmp_path, capsys):
    assert run("shards", "verify", work / "shards") == ExitCode.COMPLETE
    copied = Path(shutil.copytree(work / "shards", tmp_path / "shards"))
    path = copied / "train" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert run("shards", "verify", copied) == ExitCode.BAD_INPUT
    assert f"{path}: " in capsys.readouterr().out


def test_settings_out_of_range_name_the_key(work):
    args = ("--input", work / "c.jsonl", "--tokenizer", work / "tok", "--out", work / "x")
    with pytest.raises(ConfigError, match="validation_fraction"):
        run("shards", "build", *args, "--validation-fraction", "1.5")
    with pytest.raises(ConfigError, match="workers"):
        run("shards", "build", *args, "--workers", "0")
    with pytest.raises(DataError, match="no field 'text'; it has 'body'"):
        run("shards", "build", *args)
    assert not (work / "x").exists()


@pytest.mark.parametrize("command", [("tokenizer", "train"), ("shards", "build"), ("shards", "verify")])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*command, "--help")
    assert caught.value.code == 0
    assert f"dstrain {' '.join(command)}" in capsys.readouterr().out.split("example", 1)[1]
