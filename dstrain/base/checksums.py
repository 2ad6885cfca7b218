"""The crc32 of zlib, gzip and PNG, computed by ISA-L: the same number, several times as fast as zlib's own code.

A checksum over every block that is read is most of the cost of reading it, so its speed decides the reader's.
"""

from __future__ import annotations

from isal import isal_zlib


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """Unsigned 32-bit crc of bytes; `start` is the crc of what came before them."""
    return int(isal_zlib.crc32(data, start))
