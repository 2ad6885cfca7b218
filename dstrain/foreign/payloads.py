"""The one member of a sample that is used, and how its bytes become a text or token ids.

Three forms and no more: UTF-8 text, one text field of a JSON object, and 1-D npy arrays of token ids. Nothing else is
decoded, whatever its name: no pickle, no torch, no npz, no images. Sizes, depths, dtypes and headers are bounded before
anything is built from them. Reads no files.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.base.errors import DataError

MAX_JSON_BYTES = 8 << 20
"""Largest JSON member accepted: parsed JSON can take twenty times its bytes in memory."""
MAX_JSON_DEPTH = 64
"""Deepest nesting of lists and objects accepted; corpora stay below ten."""
MAX_JSON_CONTAINERS = 1 << 20
"""Most lists and objects of one member: each takes 64 bytes of memory for two of the file."""
MAX_NPY_HEADER_BYTES = 1024
NPY_DTYPES = ("<u2", "<u4", "<i4", "<i8")
"""Types of token ids accepted."""
NEVER_DECODED = frozenset(
    "pkl pickle pyd pth pt ckpt bin npz msgpack mp ten tb gz bz2 xz zst zip tar exe so py h5 safetensors".split()
)
"""Last parts of extensions that are refused as text: formats that run code, or that are surely no text."""
_IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm mp4 avi mov mkv wav mp3 flac ogg".split())
_NPY_HEADER = re.compile(rb"\{'descr': '(<[ui][248])', 'fortran_order': False, 'shape': \((\d{1,10}),\), \} *\n")
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_TEXT_FIRST = ("txt", "text", "json", "jsonl")

Form = Literal["text", "json", "npy"]


class MemberChoice(Config):
    """Which member of each sample holds the document, and in which form."""

    extension: str = Field(min_length=1, max_length=255)
    """Extension in lower case, all dots included, e.g. txt or tokens.npy."""
    form: Form
    """text: UTF-8; json: a text field of an object; npy: token ids."""
    field: str | None = None
    """For json: the field's name, with dots for fields inside objects."""

    @model_validator(mode="after")
    def _sensible(self) -> MemberChoice:
        if (self.form == "json") != (self.field is not None):
            raise ValueError("a field goes with the form json, and only with it")
        return self

    def __str__(self) -> str:
        """As the command line writes it."""
        return self.extension + (f":{self.field}" if self.field is not None else "")


def parse_choice(text: str) -> MemberChoice:
    """A choice from `txt`, `json:FIELD` or `tokens.npy`.

    Raises:
        DataError: the extension is never decoded, or json has no field.
    """
    extension, colon, name = text.partition(":")
    extension = extension.lower().lstrip(".")
    last = extension.rpartition(".")[2]
    if last in NEVER_DECODED or last in _IMAGES:
        raise DataError(
            f"--text-field {text}: .{extension} members are never decoded; choose a text, JSON or npy member"
        )
    if last == "npy" and not colon:
        return MemberChoice(extension=extension, form="npy")
    if last == "json" or colon:
        if not name:
            raise DataError(f"--text-field {text}: say which field of the JSON object, e.g. {extension}:text")
        return MemberChoice(extension=extension, form="json", field=name)
    if not extension:
        raise DataError(f"--text-field {text!r}: name a member's extension, e.g. txt, json:text or tokens.npy")
    return MemberChoice(extension=extension, form="text")


def detect_choice(extensions: Mapping[str, int], *, source: str) -> MemberChoice:
    """The choice that goes without saying: the only npy, txt or json member of the samples.

    Args:
        extensions: how many samples have each.
        source: the tar looked at, for messages.

    Raises:
        DataError: none or several come into question.
    """
    npy = [name for name in extensions if name.rpartition(".")[2] == "npy"]
    text = [name for name in extensions if name in _TEXT_FIRST]
    found = npy + text
    if len(found) == 1:
        name = found[0]
        return parse_choice(f"{name}:text" if name.startswith("json") else name)
    shown = ", ".join(f".{name} ({count})" for name, count in list(extensions.items())[:12]) or "none"
    raise DataError(
        f"{source}: cannot tell which member holds the documents; its samples have {shown}. "
        "Say so with --text-field, e.g. txt, json:text or tokens.npy"
    )


def read_text(data: bytes | memoryview, choice: MemberChoice) -> str:
    """The document's text.

    Raises:
        ValueError: saying what is wrong with the bytes.
    """
    raw = bytes(data)
    if choice.form == "json":
        return _json_field(raw, str(choice.field))
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from None


def _json_field(raw: bytes, name: str) -> str:
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"{len(raw)} bytes of JSON, more than {MAX_JSON_BYTES}")
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > MAX_JSON_CONTAINERS:
        raise ValueError(f"JSON with more than {MAX_JSON_CONTAINERS} lists and objects")
    if containers > MAX_JSON_DEPTH and _depth(raw) > MAX_JSON_DEPTH:
        raise ValueError(f"JSON nested deeper than {MAX_JSON_DEPTH}")
    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            has = ", ".join(repr(key) for key in list(found)[:8]) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"no field {name!r} (found {has})")
        found = found[part]
    if not isinstance(found, str):
        raise ValueError(f"the field {name!r} holds {type(found).__name__}, not text")
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
    return found


def _depth(raw: bytes) -> int:
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", raw)
    steps = np.frombuffer(outside, dtype=np.uint8)
    change = np.isin(steps, (91, 123)).astype(np.int32) - np.isin(steps, (93, 125))
    return int(np.cumsum(change).max(initial=0))


@dataclass(frozen=True)
class NpyLayout:
    """Where the ids lie in an npy member."""

    count: int
    """Token ids."""
    width: int
    """Bytes of one id: 2, 4 or 8."""
    lead: int
    """Bytes before the first id."""


def read_npy_layout(data: bytes | memoryview) -> NpyLayout:
    """Layout of an npy member; its header must say exactly what its size is.

    Raises:
        ValueError: it is no 1-D npy array of ids, e.g. of objects or with a header that is too long.
    """
    head = bytes(data[:MAX_NPY_HEADER_BYTES])
    if head[:8] != _NPY_MAGIC or len(head) < 10:
        raise ValueError("no npy file of version 1.0")
    lead = 10 + struct.unpack_from("<H", head, 8)[0]
    if lead > MAX_NPY_HEADER_BYTES:
        raise ValueError(f"an npy header of {lead} bytes, more than {MAX_NPY_HEADER_BYTES}")
    match = _NPY_HEADER.fullmatch(head, 10, lead)
    if match is not None:
        descr, count = match[1].decode(), int(match[2])
    else:
        descr, count = _unusual_header(head)
    if descr not in NPY_DTYPES:
        raise ValueError(f"npy of dtype {descr}; token ids are one of {', '.join(NPY_DTYPES)}")
    width = int(descr[2])
    if lead + count * width != len(data):
        raise ValueError(f"the npy header says {count} ids of {width} bytes, the member has {len(data) - lead} bytes")
    return NpyLayout(count=count, width=width, lead=lead)


def _unusual_header(head: bytes) -> tuple[str, int]:
    stream = io.BytesIO(head)
    np.lib.format.read_magic(stream)
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_NPY_HEADER_BYTES)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"an npy header that cannot be read: {error}") from None
    if len(shape) != 1:
        raise ValueError(f"npy of shape {shape}; token ids are one-dimensional")
    return str(dtype.str), int(shape[0])
