"""`dstrain launch shards`: the build's arguments, from the command line or a YAML with the same names, as words for the build."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.base.config import read_yaml
from dstrain.base.errors import ConfigError
from dstrain.cli.shards_build import add_build_arguments

_REQUIRED = ("input", "tokenizer", "out")


def build_words(args: argparse.Namespace, file: Path | None) -> list[str]:
    """The arguments of `dstrain shards build`, as short as they can be.

    Args:
        args: holds the build's arguments; a value other than the default wins over the file's.
        file: YAML whose keys are the build's options, such as `text_field: body` and `input: [a.jsonl, b.jsonl]`.

    Raises:
        ConfigError: an unknown key, a value of another kind, or no input, tokenizer or output.
    """
    actions = _actions()
    values = _from_file(file, actions) if file is not None else {}
    for name, action in actions.items():
        if (given := getattr(args, name)) != action.default:
            values[name] = given
    lacking = [f"--{name}" for name in _REQUIRED if not values.get(name)]
    if lacking:
        raise ConfigError(
            f"launch shards: {', '.join(lacking)} missing: give it as an option or in a YAML (input, tokenizer, out)"
        )
    words: list[str] = []
    for name, action in actions.items():
        if name in values and values[name] != action.default:
            words += _words(action, values[name])
    return words


def _actions() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_build_arguments(parser, required=False)
    return {action.dest: action for action in parser._actions}


def _from_file(file: Path, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    found = {}
    for key, value in read_yaml(file).items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, list(actions), n=2)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(actions)}"
            raise ConfigError(f"{file}: {key}: not an argument of `dstrain shards build`. {hint}")
        found[name] = _checked(actions[name], value, where=f"{file}: {key}")
    return found


def _checked(action: argparse.Action, value: Any, *, where: str) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {value!r}: true or false")
        return value
    if action.nargs == "+" or isinstance(action.default, list):
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) and item for item in items):
            raise ConfigError(f"{where}: {value!r}: a text, or a list of texts")
        return items
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where}: {value!r}: a single value")
    try:
        converted = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"{where}: {value!r}: not a {getattr(action.type, '__name__', 'value')}") from None
    if action.choices is not None and converted not in action.choices:
        raise ConfigError(f"{where}: {value!r}: one of {', '.join(map(str, action.choices))}")
    return converted


def _words(action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[-1]
    if action.nargs == 0:
        return [option]
    if action.dest == "scripts":  # the one list that takes all its values behind one option
        return [option, *map(str, value)]
    if isinstance(value, list):
        # One option for each, with `=`: a name that begins with a hyphen stays a name.
        return [f"{option}={item}" for item in value]
    return [f"{option}={value}"]
