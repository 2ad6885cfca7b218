"""The command line as a whole: quick, helpful, and one message for a person's fault."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dstrain.base.errors import (
    ConfigError,
    DstrainError,
    MachineError,
    NothingToResumeError,
    PeerError,
    RunInUseError,
    StorageError,
)
from dstrain.cli.main import build_parser, guarded, main


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that does something, as typed."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield path
    for group in groups:
        for name, child in group.choices.items():
            yield from commands(child, (*path, name))


COMMANDS = list(commands(build_parser()))


def test_the_promised_commands_are_there() -> None:
    promised = {("tokenizer", "train"), ("shards", "build"), ("shards", "inspect"), ("shards", "verify"), ("pretrain",),
                ("finetune",), ("evaluate",), ("export",)}  # fmt: skip
    assert promised <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_every_command_explains_itself_with_an_example(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "example" in said
    assert f"dstrain {' '.join(command)}" in said.split("example", 1)[1]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import contextlib, sys\nfrom dstrain.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "sys.exit(', '.join({'torch', 'deepspeed', 'transformers', 'datasets', 'numpy'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"imported: {result.stderr}"
    assert "the way from text to a model" in result.stdout


@pytest.mark.parametrize("argv", [[], ["pretrian"], ["export"], ["pretrain", "run.yaml", "--stepz", "3"]])
def test_a_command_line_that_makes_no_sense_is_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "usage: dstrain" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [ConfigError("a"), MachineError("b"), NothingToResumeError("c"), RunInUseError("d"), StorageError("e"), DstrainError("f")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_persons_fault_is_one_message_and_its_exit_code(
    error: DstrainError, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail) == int(error.exit_code)
    assert capsys.readouterr().err == f"dstrain: error: {error}\n"


def test_a_rank_that_leaves_because_of_another_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise PeerError("rank 1: no such file", exit_code=78)

    assert guarded(fail) == 78
    assert capsys.readouterr() == ("", "")


def test_a_defect_is_not_swallowed() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(fail)


def test_an_interrupt_from_the_keyboard_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise KeyboardInterrupt

    assert guarded(fail) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_has_left_is_no_fault() -> None:
    code = "from dstrain.cli.main import main; import sys; sys.exit(main(['shards', '--help']))"
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "{code}" | true'], capture_output=True, check=False
    )
    assert b"Traceback" not in result.stderr
