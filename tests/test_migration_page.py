"""docs/from-run-mlm.md names keys and options: each must exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from dstrain.cli.main import build_parser
from dstrain.stages.config import PretrainConfig
from tests.support.configuration_page import PAGE as CONFIGURATION

PAGE = Path(__file__).resolve().parents[1] / "docs/from-run-mlm.md"
ROWS = re.findall(r"^\| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
KEYS = sorted({word for _, ours in ROWS for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", ours)} - {"none"})
COMMANDS = sorted({word for _, ours in ROWS for word in re.findall(r"`(dstrain [^`]+)`", ours)})


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_page_is_a_key_of_a_run(key: str) -> None:
    fields, names = PretrainConfig.model_fields, key.split(".")
    assert names[0] in fields
    assert len(names) == 1 or f"| `{key}` |" in CONFIGURATION.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_page_is_an_option_of_its_command(command: str) -> None:
    parser: argparse.ArgumentParser = build_parser()
    for word in command.split()[1:]:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            break
        parser = groups[0].choices[word]
    options = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z-]+", command)) <= options
