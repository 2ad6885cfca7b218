"""What to do about bytes that are not UTF-8: the advice fits what the bytes look like.

It only advises. Nothing is decoded by guess: text that is wrong in silence is worse than a file that is refused.
"""

from __future__ import annotations

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def conversion_advice(data: bytes) -> str:
    """One sentence for a person whose file is not UTF-8.

    Args:
        data: bytes of the file, best from its beginning on; a few hundred are enough.
    """
    if data.startswith(_UTF16_MARKS):
        return "It is UTF-16: convert the file with `iconv -f UTF-16 -t UTF-8`"
    if b"\0" in data:
        return "It holds zero bytes, so it is not text (an archive, an image, a PDF, ...): leave the file out"
    return "Convert the file, e.g. `iconv -f WINDOWS-1252 -t UTF-8` for older Western European text; a file that is not text, leave out"
