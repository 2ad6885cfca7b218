"""Strict configuration: YAML + `key.path=value` overrides + pydantic, with errors a person can act on.

One YAML is one run. `include: [other.yaml]` is read one level deep, later files win, the file itself wins over its
includes, the command line wins over all. Unknown keys, wrong types and impossible pairs are collected into one
`ConfigError` that names the file, the key, the value and the nearest valid keys. This is the only module that reads YAML.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from dstrain.base.errors import ConfigError
from dstrain.base.text_encoding import conversion_advice


class Config(BaseModel):
    """Base of every room's configuration: unknown keys refused, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=Config)


_LIMIT_CHARACTERS = 256 << 10
_LIMIT_NODES = 20_000
_LIMIT_DEPTH = 60
_LIMIT_DIGITS = 64
_SHOWN_CHARACTERS = 200
_SHOWN_PROBLEMS = 40


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.2), where YAML 1.1 makes it a string, and refuses double keys.

    It also refuses what no configuration needs and what grows without limit when it is read: deep nesting, aliases that
    multiply or contain themselves, numbers of thousands of digits.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _LIMIT_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested more than {_LIMIT_DEPTH} levels deep", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _expanded_size(node, {})
        return node

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """An integer or a float of a sensible length."""
        if len(node.value) > _LIMIT_DIGITS:
            problem = f"a number of {len(node.value)} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        is_integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, (str, int, float)):
                problem = f"the key {key!r} is neither text nor a number"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes with every alias written out; raises for what contains itself or is too large."""
    if (size := known.get(id(node))) is not None:
        if not size:
            raise yaml.composer.ComposerError(None, None, "an alias that contains itself", node.start_mark)
        return size
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    size = 1 + sum(_expanded_size(part, known) for part in parts)
    if size > _LIMIT_NODES:
        problem = f"more than {_LIMIT_NODES} values, aliases written out"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    known[id(node)] = size
    return size


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {k: list(v) for k, v in _side.yaml_implicit_resolvers.items()}
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text into plain Python objects.

    Raises:
        ConfigError: the text is not valid YAML; the message names `source` and the line.
    """
    if len(text) > _LIMIT_CHARACTERS:
        raise ConfigError(f"{source}: {len(text)} characters; a configuration has at most {_LIMIT_CHARACTERS}")
    try:
        loader = _Loader(text)  # a SafeLoader: builds plain objects only
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except ValueError as error:  # of a date that does not exist, for one
        raise ConfigError(f"{source}: not valid YAML: {shortened(str(error))}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}{where}: not valid YAML: {shortened(problem)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file and its `include` list (one level deep) into a nested dict.

    Raises:
        ConfigError: the file is missing, unreadable, or not a mapping, or an include is not a file name.
    """
    data = _read_mapping(path)
    includes = data.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include: must be a file name or a list of file names, got {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        part = _read_mapping(path.parent / name)
        if "include" in part:
            raise ConfigError(f"{path.parent / name}: an included file cannot include others; list them all in {path}")
        merged = merge(merged, part)
    return merge(merged, data)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")  # editors on Windows put a byte order mark in front
    except IsADirectoryError:
        held = sorted(p.name for p in path.glob("*.yaml"))
        hint = f"one of its files: {', '.join(held[:5])}" if held else "a YAML file"
        raise ConfigError(f"{path}: is a folder, not a configuration file. Give {hint}") from None
    except FileNotFoundError:
        # Stems, because equal endings would make any two names look alike.
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=3)
        hint = f" Did you mean {', '.join(str(path.parent / f'{n}.yaml') for n in near)}?" if near else ""
        raise ConfigError(f"{path}: no such configuration file.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. {conversion_advice(data)}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    found = parse_yaml(text, source=str(path))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, found {type(found).__name__}")
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overlaid with `over`; mappings merge key by key, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `["train.max_steps=100", "data.path=x"]` into a nested dict; values are read as YAML.

    Raises:
        ConfigError: an override has no `=` or an empty key part.
    """
    result: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {shortened(text)!r}: write key.path=value, for example train.max_steps=100")
        nested: Any = parse_yaml(value, source=f"override {shortened(text)!r}") if value.strip() else None
        for part in reversed(parts):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def load_config(
    model: type[ConfigT], path: Path | None, overrides: Sequence[str] = (), *, overlay: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> ConfigT:  # fmt: skip
    """Read, merge and validate a run's configuration.

    Args:
        model: the pydantic model of the whole run.
        path: the YAML file, or None for defaults and overrides only.
        overrides: `key.path=value` strings from the command line.
        overlay: laid over the file, below the overrides.
        check: looks at what was merged before it is validated, and raises what says more than unknown keys would.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    data = read_yaml(path) if path is not None else {}
    data = merge(merge(data, overlay or {}), parse_overrides(overrides))
    if check is not None:
        check(data)
    return validate(model, data, source=str(path) if path is not None else "command line")


def validate(model: type[ConfigT], data: Mapping[str, Any], *, source: str) -> ConfigT:
    """Validate plain data against `model`; JSON rules, so lists fit tuples and strings fit paths, numbers stay strict.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    try:
        return model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        lines = sorted({_explain(model, problem, data) for problem in error.errors()})
        if len(lines) > _SHOWN_PROBLEMS:
            lines = [*lines[:_SHOWN_PROBLEMS], f"... and {len(lines) - _SHOWN_PROBLEMS} more problems"]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def shortened(text: str) -> str:
    """Text for a message, its middle left out where it is long."""
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def to_plain(config: BaseModel) -> dict[str, Any]:
    """The resolved configuration as JSON-able data, defaults included."""
    data: dict[str, Any] = config.model_dump(mode="json")
    return data


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text with keys in their given order."""
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _explain(model: type[Config], problem: ErrorDetails, data: Mapping[str, Any]) -> str:
    location = [part for part in problem["loc"] if not _is_union_tag(part, problem)]
    key = ".".join(str(part) for part in location) or "(top level)"
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key.{_suggest(model, location, data)}"
    if kind == "missing":
        return f"{key}: this key is required and missing"
    if kind == "value_error":
        message = str(problem.get("ctx", {}).get("error", problem["msg"]))
        return f"{key}: {message}" if location else message
    value = problem.get("input")
    shown = "" if isinstance(value, (dict, list)) and len(str(value)) > 80 else f" (got {shortened(repr(value))})"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}{shown}"


def _is_union_tag(part: Any, problem: ErrorDetails) -> bool:
    # pydantic puts the chosen union member into the location; people never typed it.
    return isinstance(part, str) and (part.endswith("Config") or part.startswith(("function-", "tagged-")))


def _suggest(model: type[Config], location: Sequence[Any], data: Mapping[str, Any]) -> str:
    owner: Any = model
    for part in location[:-1]:
        owner = _field_model(owner, part)
    names = _field_names(owner)
    near = difflib.get_close_matches(str(location[-1]), names, n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    elsewhere = [p for p in _all_keys(model) if p.split(".")[-1] == str(location[-1])]
    if elsewhere:
        return f" Did you mean {' or '.join(elsewhere[:3])}?"
    return f" Valid keys here: {', '.join(sorted(names))}" if names else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
    return []


def _field_model(owner: Any, part: Any) -> Any:
    for model in owner if isinstance(owner, list) else [owner]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:
            return _models_in(field.annotation)
    return owner


def _field_names(owner: Any) -> list[str]:
    models = owner if isinstance(owner, list) else [owner]
    return sorted({name for model in models for name in getattr(model, "model_fields", {})})


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(field.annotation):
            keys.extend(_all_keys(inner, f"{prefix}{name}."))
    return keys
