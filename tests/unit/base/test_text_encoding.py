"""Advice for bytes that are not UTF-8."""

from __future__ import annotations

import pytest

from dstrain.base.text_encoding import conversion_advice


@pytest.mark.parametrize("order", ["utf-16", "utf-16-be"])
def test_utf16_is_never_sent_through_an_8_bit_code_page(order: str) -> None:
    mark = b"" if order == "utf-16" else b"\xfe\xff"
    assert "iconv -f UTF-16 -t UTF-8" in conversion_advice(mark + "Hello\n".encode(order))


def test_bytes_with_zeros_are_no_text() -> None:
    assert "leave the file out" in conversion_advice(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")


def test_a_code_page_is_only_an_example() -> None:
    advice = conversion_advice("Café au lait".encode("latin-1"))
    assert "e.g. `iconv -f WINDOWS-1252 -t UTF-8`" in advice
