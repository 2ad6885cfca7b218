"""Write the tables of docs/configuration.md from the configuration models, so that page and code cannot part.

    python tests/support/configuration_page.py        (`make docs`)

Everything between the two marks in the page is replaced; the rest is written by hand. tests/test_house.py fails while
the page is out of date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dstrain.stages.config import FinetuneConfig, PretrainConfig

PAGE = Path(__file__).resolve().parents[2] / "docs/configuration.md"
BEGIN, END = "<!-- tables: begin (make docs) -->", "<!-- tables: end -->"


def tables() -> str:
    """The generated part of the page."""
    pretrain, finetune = PretrainConfig.model_json_schema(), FinetuneConfig.model_json_schema()
    shared = [
        name for name in pretrain["properties"] if pretrain["properties"][name] == finetune["properties"].get(name)
    ]
    parts = ["### Both stages", _top_level(pretrain, shared)]
    parts += [_section(pretrain, name) for name in shared if name != "deepspeed"]
    for title, schema in (("Pretraining", pretrain), ("Fine-tuning", finetune)):
        own = [name for name in schema["properties"] if name not in shared]
        parts += [f"### {title}", _top_level(schema, own)]
        parts += [_section(schema, name) for name in own]
    return "\n\n".join(part for part in parts if part) + "\n"


def render(page: str) -> str:
    """The page with its tables renewed."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def _top_level(schema: dict[str, Any], names: list[str]) -> str:
    plain = [name for name in names if _model_of(schema, schema["properties"][name]) is None]
    return _table(schema, "", plain, schema["properties"], schema.get("required", [])) if plain else ""


def _section(schema: dict[str, Any], name: str) -> str:
    field = schema["properties"][name]
    model = _model_of(schema, field)
    return _model_section(schema, name, field, model) if model is not None else ""


def _model_section(schema: dict[str, Any], path: str, field: dict[str, Any], model: dict[str, Any]) -> str:
    """A table of a model's plain fields, and a section of its own for each model inside it."""
    changed = field.get("default") or {}
    properties = {
        key: {**value, **({"default": changed[key]} if key in changed else {})}
        for key, value in model["properties"].items()
    }
    inner = {key: found for key, value in properties.items() if (found := _inner_model(schema, value)) is not None}
    plain = [key for key in properties if key not in inner or inner[key][0]]
    about = model.get("description", field.get("description", "")).splitlines()[0]
    parts = [f"#### `{path}`\n\n{about}\n\n" + _table(schema, f"{path}.", plain, properties, model.get("required", []))]
    for key, (is_list, found) in inner.items():
        name = f"{path}.{key}" + ("[]" if is_list else "")
        parts.append(_model_section(schema, name, {} if is_list else properties[key], found))
    return "\n\n".join(parts)


def _inner_model(schema: dict[str, Any], field: dict[str, Any]) -> tuple[bool, dict[str, Any]] | None:
    """The model of a field, and whether the field is a list of them."""
    is_list = field.get("type") == "array"
    model = _model_of(schema, field.get("items", {}) if is_list else field)
    return (is_list, model) if model is not None else None


def _model_of(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any] | None:
    parts = [*field.get("allOf", []), *field.get("anyOf", [])]  # anyOf: a section that may be left out
    reference = field.get("$ref") or next((part["$ref"] for part in parts if "$ref" in part), None)
    model: dict[str, Any] | None = schema["$defs"].get(reference.rpartition("/")[2]) if reference else None
    return model if model and "properties" in model else None


def _table(
    schema: dict[str, Any], prefix: str, names: list[str], properties: dict[str, Any], required: list[str]
) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = properties[name]
        default = "**required**" if name in required else f"`{json.dumps(_default(field), ensure_ascii=False)}`"
        meaning = re.sub(r"\s+", " ", field.get("description", "")).replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | {_values(field)} | {default} | {meaning} |")
    return "\n".join(lines)


def _default(field: dict[str, Any]) -> Any:
    return field.get("default", {"object": {}, "array": []}.get(field.get("type", "")))


def _values(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "[" not in field.get("pattern", "["):  # a choice of words
        return ", ".join(f"`{word}`" for word in re.findall(r"[a-z]+", field["pattern"]))
    if field.get("type") == "array":
        inner = field["prefixItems"][0] if "prefixItems" in field else field["items"]
        return "list of mappings (below)" if "$ref" in inner else f"list of {_values(inner)}"
    word = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "true, false",
        "null": "null",
        "object": "mapping",
    }
    name = "path" if field.get("format") == "path" else word.get(field.get("type", ""), "any")
    return name + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    found = [f"{sign} {field[key]:,}".removesuffix(".0") for key, sign in signs if key in field]
    return f" {', '.join(found)}" if found else ""


def write() -> None:
    """Renew docs/configuration.md in place."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
