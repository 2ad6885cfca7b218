"""A strict walk over the headers of a tar somebody else wrote: names, places and sizes of its regular files.

Reads headers and seeks over payloads; extracts nothing, follows nothing, and does not use Python's `tarfile`, which
accepts damaged, sparse and compressed archives. What is not a plain sequence of regular files and folders, ended as a tar
must end, is a `TarRefusedError` whose `reason` is one of `refusal.REASONS`. USTAR, GNU long names and PAX paths are understood;
everything else a header can say is refused. Knows nothing of samples.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zlib import adler32

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.foreign.refusal import REASONS, TarRefusedError

UNIT = 512
"""Bytes of a tar header, and what payloads are padded to (POSIX.1-1988 ustar)."""
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
    b"PK\x03\x04": "unzip, then tar --create",
}
_WINDOW_BYTES = 256 << 10
_SPARSE_WINDOW_BYTES = 4096  # where payloads are large, reading ahead would read them
_EXTENSION_LIMIT = 64 << 10  # bytes of a long name or PAX header; Linux paths end at 4096
_TRAILING_LIMIT = 64 << 20  # zeros allowed after the end; tar pads to its record, 10 KiB, rarely to 1 MiB
_HARMLESS_PAX = ("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment", "charset", "realtime.")
_HARMLESS_VENDORS = ("SCHILY.", "LIBARCHIVE.", "MSWINDOWS.")
_CONTROL = bytes(range(32)) + b"\x7f"
_HINT = "Make the shard again, or copy it again if it was whole elsewhere"


class TarLimits(Config):
    """Bounds on what one shard may hold, so that a hostile one costs little."""

    max_member_bytes: int = Field(default=64 << 20, ge=1, le=1 << 32)
    """Largest member accepted, in bytes; also those that are not used, since a shard that breaks it is suspect."""
    max_members: int = Field(default=1 << 22, ge=1, le=1 << 28)
    """Most members of one shard; webdataset's writer stops at 100,000 samples."""


@dataclass
class Members:
    """The regular files of one tar, in order."""

    size_bytes: int
    """Size of the tar file."""
    end: int = 0
    """Offset of the end-of-archive mark."""
    names: list[str] = field(default_factory=list)
    """Full names; bytes that are not UTF-8 are kept as lone surrogates, as `tarfile` does."""
    starts: array[int] = field(default_factory=lambda: array("q"))
    """Offset of each member's first header, extended headers included."""
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Offset of each payload."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    """Bytes of each payload."""


def walk_tar(path: Path, limits: TarLimits | None = None) -> Members:
    """All regular files of a tar, or a refusal.

    Args:
        path: a local file.
        limits: bounds, defaults if None.

    Raises:
        TarRefusedError: naming file, offset and reason.
        DataError: the file cannot be opened or read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        return _Walk(path, handle, limits or TarLimits()).run()
    except OSError as error:
        raise DataError(f"{path}: reading failed: {error}") from error
    finally:
        os.close(handle)


class _Walk:
    def __init__(self, path: Path, handle: int, limits: TarLimits) -> None:
        self._path, self._handle, self._limits = path, handle, limits
        self._size = os.fstat(handle).st_size
        self._window, self._window_at = b"", 0
        self._read_bytes = _WINDOW_BYTES
        self._members = Members(size_bytes=self._size)
        self._long_name: bytes | None = None
        self._pax: dict[bytes, bytes] = {}
        self._start = 0

    def run(self) -> Members:
        self._check_kind()
        members, limits = self._members, self._limits
        at, size, last = 0, self._size, self._size - UNIT
        names, starts, offsets, sizes = members.names, members.starts, members.offsets, members.sizes
        while True:
            if at > last:
                raise self._refuse(
                    "cut" if at > size else "no-end", at, "the tar ends without its end mark: it was cut"
                )
            begin = at - self._window_at
            if begin < 0 or begin + UNIT > len(self._window):
                self._fill(at)
                begin = 0
            header = self._window[begin : begin + UNIT]
            if not header[0] and header == _ZEROS:
                self._finish(at)
                return members
            # Adler-32's low half is 1 + the sum of the bytes modulo 65521, which a quarter KiB cannot reach.
            total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
            stored = header[148:156]
            if total - sum(stored) + 256 != self._number(stored, at, "checksum"):
                raise self._refuse("checksum", at, "the header's checksum does not match its bytes")
            length = self._number(header[124:136], at, "size-field")
            kind = header[156]
            payload = at + UNIT
            at = payload + length + (-length % UNIT)
            if kind not in _REGULAR:
                at = self._other(kind, header, payload, length, at)
                continue
            if length > limits.max_member_bytes:
                raise self._refuse(
                    "oversized", payload, f"a member of {length} bytes, more than {limits.max_member_bytes}"
                )
            if at > size:
                raise self._refuse("cut", payload, f"a member of {length} bytes reaches beyond the file's end")
            name = self._name(header, payload, length)
            if name is None:  # an old way to write a folder
                continue
            if len(names) == limits.max_members:
                raise self._refuse("too-many", payload, f"more than {limits.max_members} members")
            names.append(name)
            starts.append(self._start)
            offsets.append(payload)
            sizes.append(length)
            self._start = at

    def _check_kind(self) -> None:
        if self._size == 0:
            raise self._refuse("empty-file", 0, "the file is empty")
        head = os.pread(self._handle, UNIT, 0)
        for magic, tool in _COMPRESSED.items():
            if head.startswith(magic):
                raise self._refuse(
                    "compressed", 0, f"the whole file is compressed; unpack it first (`{tool}`): a compressed tar "
                    "cannot be read at random", hint=""
                )  # fmt: skip
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
        if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<error")):
            raise self._refuse("html", 0, "this is a web page, mostly an error saved in place of the shard",
                               hint="Download it again")  # fmt: skip
        if text.startswith(b"version https://git-lfs"):
            raise self._refuse("git-lfs", 0, "this is a Git LFS pointer", hint="Run `git lfs pull`")
        if self._size % UNIT:
            # Checked once here: from now on every header that begins inside the file also ends inside it.
            raise self._refuse("cut", self._size, f"{self._size} bytes are no whole number of {UNIT}-byte units")

    def _fill(self, at: int) -> None:
        # Small payloads: one read serves many headers. Large ones: read little more than the header.
        far = at - (self._window_at + len(self._window)) > _SPARSE_WINDOW_BYTES
        self._read_bytes = _SPARSE_WINDOW_BYTES if far else min(_WINDOW_BYTES, 4 * self._read_bytes)
        self._window = os.pread(self._handle, self._read_bytes, at)
        self._window_at = at
        if len(self._window) < UNIT:
            raise self._refuse("cut", at, "the file shrank while it was read")

    def _number(self, raw: bytes, at: int, reason: str) -> int:
        digits = raw.rstrip(b" \0").lstrip(b" ")
        if digits.isdigit():
            try:
                return int(digits, 8)
            except ValueError:
                pass
        elif raw[0] == 0x80 and reason == "size-field":  # GNU base-256, for sizes beyond 8 GiB
            return int.from_bytes(raw[1:], "big")
        raise self._refuse(reason, at, f"the header's number {raw!r} is not octal")

    def _other(self, kind: int, header: bytes, payload: int, length: int, after: int) -> int:
        """Handle a header that is no regular file; returns where the next one stands."""
        letter = chr(kind)
        if letter == "5":
            if length:
                raise self._refuse("size-override", payload, "a folder with a size")
            self._name(header, payload, 0, folder=True)
            self._start = payload
            return payload
        reason = _REFUSED_KINDS.get(letter)
        if reason is not None:
            raise self._refuse(reason, payload, f"{REASONS[reason]} ({self._shown(header)})")
        if letter not in "Lxg":
            raise self._refuse("unknown-type", payload, f"a member of the unknown type {letter!r}")
        if length > _EXTENSION_LIMIT:
            raise self._refuse("extension", payload, f"an extended header of {length} bytes")
        if after > self._size:
            raise self._refuse("cut", payload, "an extended header reaches beyond the file's end")
        data = os.pread(self._handle, length, payload)
        if letter == "L":
            if self._long_name is not None:
                raise self._refuse("extension", payload, "two long names for one member")
            self._long_name = data.rstrip(b"\0")
            if not self._long_name or b"\0" in self._long_name:
                raise self._refuse("extension", payload, "a long name that is empty or holds zero bytes")
        else:
            self._read_pax(data, payload, is_global=letter == "g")
            if letter == "g":  # belongs to the archive, not to the next member
                self._start = after
        return after

    def _read_pax(self, data: bytes, at: int, *, is_global: bool) -> None:
        for key, value in self._pax_records(data, at):
            name = key.decode("utf-8", "replace")
            if name.startswith(("GNU.sparse", "SCHILY.realsize")):
                raise self._refuse("sparse", at, "a sparse file (PAX)")
            if name.startswith((*_HARMLESS_PAX, *_HARMLESS_VENDORS)):
                continue
            if is_global or name not in ("path", "size", "hdrcharset"):
                raise self._refuse("extension", at, f"the PAX keyword {name!r}")
            if key in self._pax:
                raise self._refuse("extension", at, f"the PAX keyword {name!r} stands twice")
            self._pax[key] = value

    def _pax_records(self, data: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
        place = 0
        while place < len(data):
            space = data.find(b" ", place, place + 8)
            digits = data[place:space] if space > 0 else b""
            stop = place + int(digits) if digits.isdigit() else 0
            key, equals, value = data[space + 1 : stop - 1].partition(b"=")
            if not space < stop <= len(data) or data[stop - 1 : stop] != b"\n" or not key or not equals:
                raise self._refuse("extension", at, "a PAX header that cannot be read")
            yield key, value
            place = stop

    def _name(self, header: bytes, at: int, length: int, *, folder: bool = False) -> str | None:
        """The member's full name, checked; None for a folder written as an empty file with a slash."""
        if self._long_name is None and not self._pax:
            raw = header[:100]
            stop = raw.find(0)
            if stop >= 0:
                raw = raw[:stop]
            if header[345]:
                raw = self._prefixed(raw, header, at)
        else:
            raw = self._extended(header, at, length)
        if raw.translate(None, _CONTROL) != raw or not raw:
            raise self._refuse("name", at, f"the name {raw!r} is empty or holds control characters")
        if raw[0] == 47 or (b".." in raw and b".." in raw.split(b"/")):
            raise self._refuse("traversal", at, f"the name {raw!r} is absolute or goes up with '..'")
        if raw[-1] == 47 and not folder:
            if header[156] == 0 and length == 0:
                self._start = at
                return None
            raise self._refuse("name", at, f"a file whose name {raw!r} is that of a folder")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("utf-8", "surrogateescape")

    def _prefixed(self, raw: bytes, header: bytes, at: int) -> bytes:
        # GNU tar keeps times and sparse maps where POSIX has the name's prefix.
        if header[257:263] != b"ustar\0":
            raise self._refuse("extension", at, "a header with unknown fields (old GNU format)")
        return header[345:500].split(b"\0", 1)[0] + b"/" + raw

    def _extended(self, header: bytes, at: int, length: int) -> bytes:
        pax, self._pax = self._pax, {}
        long_name, self._long_name = self._long_name, None
        if b"path" in pax and long_name is not None:
            raise self._refuse("extension", at, "a GNU and a PAX name for one member")
        if pax.get(b"hdrcharset", b"BINARY") not in (b"BINARY", b"ISO-IR 10646 2000 UTF-8"):
            raise self._refuse("extension", at, "an unknown hdrcharset")
        if b"size" in pax and (not pax[b"size"].isdigit() or int(pax[b"size"]) != length):
            raise self._refuse("size-override", at, f"PAX says {pax[b'size']!r} bytes, the header {length}")
        name = pax.get(b"path", long_name)
        if name is not None:
            return name.rstrip(b"/") if b"path" in pax else name
        raw = header[:100].split(b"\0", 1)[0]
        return self._prefixed(raw, header, at) if header[345] else raw

    def _finish(self, at: int) -> None:
        if self._long_name is not None or self._pax:
            raise self._refuse("extension", at, "an extended header without its member")
        if at + 2 * UNIT > self._size:
            raise self._refuse("no-end", at, "half of the end-of-archive mark is missing: the tar was cut")
        place = at
        while place < self._size:
            data = os.pread(self._handle, 1 << 20, place)
            if data.count(0) != len(data) or not data:
                second = place == at and data[UNIT : 2 * UNIT] != _ZEROS
                raise self._refuse(
                    "zeroed-header" if second else "trailing-data", place,
                    "an empty header with more data behind it: damaged, or several tars in one file",
                )  # fmt: skip
            place += len(data)
            if place - at > _TRAILING_LIMIT:
                raise self._refuse("trailing-data", place, f"more than {_TRAILING_LIMIT} zeros at the end")
        self._members.end = at

    def _shown(self, header: bytes) -> str:
        return repr(header[:100].split(b"\0", 1)[0])

    def _refuse(self, reason: str, at: int, text: str, *, hint: str = _HINT) -> TarRefusedError:
        message = f"{self._path}: refused ({reason}) at byte {at}: {text}. {hint}".rstrip()
        return TarRefusedError(message, reason=reason)


_ZEROS = bytes(UNIT)
_REGULAR = frozenset(b"0\0")
_REFUSED_KINDS = {
    "1": "link",
    "2": "link",
    "K": "link",
    "3": "special",
    "4": "special",
    "6": "special",
    "D": "special",
    "M": "special",
    "V": "special",
    "N": "special",
    "S": "sparse",
    "7": "unknown-type",
}
