from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.foreign.payloads import (
    MAX_JSON_BYTES,
    MemberChoice,
    detect_choice,
    parse_choice,
    read_npy_layout,
    read_text,
)
from tests.support.foreign_tars import npy

TEXT = MemberChoice(extension="txt", form="text")
JSON = MemberChoice(extension="json", form="json", field="text")


def raw_npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("txt", ("txt", "text", None)),
        (".TXT", ("txt", "text", None)),
        ("json:a.b", ("json", "json", "a.b")),
        ("meta.json:text", ("meta.json", "json", "text")),
        ("tokens.npy", ("tokens.npy", "npy", None)),
    ],
)
def test_a_choice_is_named_by_extension_and_field(text: str, expected: tuple[str, str, str | None]) -> None:
    choice = parse_choice(text)
    assert (choice.extension, choice.form, choice.field) == expected
    assert str(choice) == text.lower().lstrip(".")


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "x.pt", "npz", "gz", "jpg", "mp4", "py"])
def test_formats_that_run_code_or_are_no_text_are_never_decoded(extension: str) -> None:
    with pytest.raises(DataError, match="never decoded"):
        parse_choice(extension)


@pytest.mark.parametrize("text", ["json", "", "x:"])
def test_an_incomplete_choice_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="--text-field"):
        parse_choice(text)


def test_the_only_candidate_goes_without_saying() -> None:
    assert str(detect_choice({"jpg": 9, "txt": 9, "cls": 9}, source="a.tar")) == "txt"
    assert str(detect_choice({"json": 9}, source="a.tar")) == "json:text"
    assert str(detect_choice({"input_ids.npy": 9, "jpg": 9}, source="a.tar")) == "input_ids.npy"
    for several in ({"txt": 9, "json": 9}, {"jpg": 9}, {}):
        with pytest.raises(DataError, match=r"a\.tar: cannot tell which member"):
            detect_choice(several, source="a.tar")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_is_read_back(text: str) -> None:
    assert read_text(text.encode(), TEXT) == text.removeprefix("\ufeff")
    assert read_text(json.dumps({"text": text, "n": [1]}).encode(), JSON) == text


def test_fields_inside_objects_are_reached() -> None:
    choice = MemberChoice(extension="json", form="json", field="a.b")
    assert read_text(b'{"a": {"b": "x"}}', choice) == "x"


@pytest.mark.parametrize(
    ("data", "choice", "reason"),
    [
        (b"caf\xe9", TEXT, "not UTF-8: byte 0xe9 at offset 3"),
        (b"{", JSON, "not JSON"),
        (b"[1]", JSON, r"no field 'text' \(found list"),
        (b'{"body": 1}', JSON, r"no field 'text' \(found 'body'\)"),
        (b'{"text": 1}', JSON, "holds int, not text"),
        (b'{"text": "\\ud800"}', JSON, "not valid Unicode"),
        (b'{"text": ' + b"[" * 100 + b"]" * 100 + b"}", JSON, "nested deeper than 64"),
        (b"[" * 100_000, JSON, "nested deeper than 64"),
        (b'{"text": [' + b"[]," * (1 << 20) + b"1]}", JSON, "more than 1048576 lists and objects"),
        (b'{"text": ' + b"9" * 10_000 + b"}", JSON, "not JSON"),
        (b" " * (MAX_JSON_BYTES + 1), JSON, "bytes of JSON, more than"),
    ],
)
def test_bytes_that_are_no_document_say_why(data: bytes, choice: MemberChoice, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_text(data, choice)


def test_brackets_inside_strings_are_no_nesting() -> None:
    assert read_text(json.dumps({"text": "[{" * 500}).encode(), JSON) == "[{" * 500


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8"])
def test_npy_layout_is_numpys(dtype: str) -> None:
    data = npy(np.arange(7, dtype=dtype))
    layout = read_npy_layout(data)
    assert np.frombuffer(data, dtype=dtype, offset=layout.lead).tolist() == list(range(7))
    assert (layout.count, layout.width) == (7, np.dtype(dtype).itemsize)


def test_a_header_written_in_another_way_is_read_too() -> None:
    head = b"{ 'shape':(3,),'fortran_order':False,'descr':'<u2'}\n"
    assert read_npy_layout(raw_npy(head, bytes(6))).count == 3


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([{"a": 1}], dtype=object)),
        npy(np.zeros((2, 2), "<u2")),
        npy(np.array(5, "<u2")),
        npy(np.zeros(3, ">u2")),
        npy(np.zeros(3, "<f4")),
        npy(np.zeros(3, "S4")),
        npy(np.zeros(3, [("a", "<u2")])),
        npy(np.zeros(3, "<u2"))[:-1],
        npy(np.zeros(3, "<u2")) + b"\0",
        raw_npy(b"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,), }\n"),
        raw_npy(b"{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }\n"),
        raw_npy(b"(" * 900),
        raw_npy(b"{" * 500 + b"}" * 500),
        raw_npy(b"__import__('os').system('true')"),
        raw_npy(b" " * 60000),
        raw_npy(b"'''\n"),
        b"\x93NUMPY\x02\x00",
        pickle.dumps([1]),
        b"",
    ],
)
def test_what_is_no_row_of_ids_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        read_npy_layout(data)


@given(st.binary(max_size=200))
def test_random_headers_never_crash(junk: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        read_npy_layout(raw_npy(junk + b"\n", b"abc"))
