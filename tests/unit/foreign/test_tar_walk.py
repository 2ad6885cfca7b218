from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.foreign.refusal import REASONS, TarRefusedError
from dstrain.foreign.tar_walk import TarLimits, walk_tar
from tests.support.foreign_tars import write_tar

PLAIN = [("a.txt", b"first"), ("b.txt", b"x" * 700), ("c.txt", b"")]


def header(name: bytes = b"a.txt", *, size: bytes = b"00000000005\0", kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """A ustar header with a right checksum."""
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    fields += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(64) + bytes(16) + prefix.ljust(155, b"\0")
    fields = fields.ljust(512, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def archive(*parts: bytes, end: bytes = bytes(1024)) -> bytes:
    return b"".join(part + bytes(-len(part) % 512) for part in parts) + end


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        lines += str(length).encode() + body
    return header(b"x", size=b"%011o\0" % len(lines), kind=b"x") + lines + bytes(-len(lines) % 512)


def reason_of(tmp_path: Path, data: bytes, limits: TarLimits | None = None) -> str:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    with pytest.raises(TarRefusedError) as caught:
        walk_tar(path, limits)
    assert str(path) in str(caught.value)
    assert caught.value.reason in REASONS
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason


ONE = [header(), b"hello"]
HOSTILE = {
    "link": archive(header(kind=b"2", size=b"0\0")),
    "hard link": archive(header(kind=b"1", size=b"0\0")),
    "long link": archive(header(b"././@LongLink", kind=b"K"), b"hello", *ONE),
    "device": archive(header(kind=b"3", size=b"0\0")),
    "fifo": archive(header(kind=b"6", size=b"0\0")),
    "gnu sparse": archive(header(kind=b"S", size=b"0\0")),
    "pax sparse": archive(pax(GNU__sparse__major="1"), *ONE),
    "star sparse": archive(pax(SCHILY__realsize="1073741824"), *ONE),
    "unknown type": archive(header(kind=b"Z"), b"hello"),
    "oversized": archive(header(size=b"77777777777\0")),
    "base-256 size": archive(header(size=b"\x80" + (1 << 60).to_bytes(11, "big"))),
    "negative size": archive(header(size=b"\xff" * 12)),
    "signed size": archive(header(size=b"-0000000005\0")),
    "two numbers in a size": archive(header(size=b"5\x007\0")),
    "empty size": archive(header(size=b"")),
    "out of range": archive(header(size=b"00000777777\0"), b"hello"),
    "pax size": archive(pax(size="9"), *ONE),
    "pax path twice": archive(pax(path="a"), pax(path="b"), *ONE),
    "pax keyword": archive(pax(linkpath="a"), *ONE),
    "pax cut": archive(header(size=b"00000000005\0", kind=b"x"), b"99 pa", *ONE),
    "pax alone": archive(pax(path="a.txt")),
    "two names": archive(header(b"././@LongLink", kind=b"L"), b"hello", pax(path="b"), *ONE),
    "long name alone": archive(header(b"././@LongLink", kind=b"L"), b"hello"),
    "large extension": archive(header(kind=b"x", size=b"00000777777\0"), bytes(0o777777), *ONE),
    "global path": archive(header(size=b"00000000012\0", kind=b"g"), b"10 path=a\n", *ONE),
    "parent": archive(header(b"a/../../etc/evil.txt"), b"hello"),
    "pax parent": archive(pax(path="../evil.txt"), *ONE),
    "absolute": archive(header(b"/etc/evil.txt"), b"hello"),
    "prefix parent": archive(header(b"evil.txt", prefix=b".."), b"hello"),
    "newline": archive(header(b"a\nb.txt"), b"hello"),
    "delete": archive(header(b"a\x7fb.txt"), b"hello"),
    "no name": archive(header(b""), b"hello"),
    "folder with a size": archive(header(b"d/", kind=b"5"), b"hello"),
    "file named as a folder": archive(header(b"d/"), b"hello"),
    "checksum": archive(header()[:-1] + b"x", b"hello"),
    "zero inside": archive(*ONE, bytes(512), *ONE),
    "two tars": archive(*ONE) + archive(*ONE),
    "half an end": archive(*ONE, end=bytes(512)),
    "no end": archive(*ONE, end=b""),
    "odd size": archive(*ONE) + b"\0",
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>404</body></html>".ljust(2048),
    "xml": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "gzip": gzip.compress(archive(*ONE)),
    "bzip2": bz2.compress(archive(*ONE)),
    "xz": lzma.compress(archive(*ONE)),
    "zstd": zstandard.ZstdCompressor().compress(archive(*ONE)),
    "not a tar": b"hello world, this is no tar at all" * 40,
}
EXPECTED = {
    "link": "link", "hard link": "link", "long link": "link", "device": "special", "fifo": "special",
    "gnu sparse": "sparse", "pax sparse": "sparse", "star sparse": "sparse", "unknown type": "unknown-type",
    "oversized": "oversized", "base-256 size": "oversized", "negative size": "size-field",
    "signed size": "size-field", "two numbers in a size": "size-field", "empty size": "size-field",
    "out of range": "cut", "pax size": "size-override", "pax path twice": "extension", "pax keyword": "extension",
    "pax cut": "extension", "pax alone": "extension", "two names": "extension", "long name alone": "extension",
    "large extension": "extension", "global path": "extension", "parent": "traversal", "pax parent": "traversal",
    "absolute": "traversal", "prefix parent": "traversal", "newline": "name", "delete": "name", "no name": "name",
    "folder with a size": "size-override", "file named as a folder": "name", "checksum": "checksum",
    "zero inside": "zeroed-header", "two tars": "trailing-data", "half an end": "no-end", "no end": "no-end",
    "odd size": "cut", "empty": "empty-file", "html": "html", "xml": "html", "lfs": "git-lfs",
    "gzip": "compressed", "bzip2": "compressed", "xz": "compressed", "zstd": "compressed", "not a tar": "cut",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_what_is_no_plain_tar_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    assert reason_of(tmp_path, HOSTILE[kind]) == EXPECTED[kind]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_places_and_sizes_are_tarfiles(tmp_path: Path, form: int) -> None:
    names = ["plain.txt", "d" * 80 + "/" + "n" * 60 + ".txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["é" * 130 + ".txt", "long/" * 60 + "k.json"]
    path = write_tar(tmp_path / "a.tar", [(name, b"x" * n * 300) for n, name in enumerate(names)], form=form)
    found = walk_tar(path)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert found.names == [member.name for member in members]
    assert list(found.offsets) == [member.offset_data for member in members]
    assert list(found.sizes) == [member.size for member in members]
    assert list(found.starts) == [member.offset for member in members]


def test_folders_and_old_folders_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    zero = b"00000000000\0"
    path.write_bytes(archive(header(b"./", kind=b"5", size=zero), header(b"old/", kind=b"\0", size=zero), *ONE))
    assert walk_tar(path).names == ["a.txt"]


def test_a_header_for_the_whole_archive_is_skipped_if_harmless(tmp_path: Path) -> None:
    path = tmp_path / "git.tar"
    comment = b"52 comment=" + b"0" * 40 + b"\n"
    path.write_bytes(archive(header(size=b"%011o\0" % len(comment), kind=b"g"), comment, *ONE))
    assert walk_tar(path).names == ["a.txt"]


def test_limits_hold(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", PLAIN).read_bytes()
    assert reason_of(tmp_path, data, TarLimits(max_member_bytes=699)) == "oversized"
    assert reason_of(tmp_path, data, TarLimits(max_members=2)) == "too-many"
    assert len(walk_tar(tmp_path / "a.tar", TarLimits(max_member_bytes=700, max_members=3)).names) == 3


def test_payloads_are_only_bytes(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as inner:
        inner.writestr("../evil", b"x")
    path = write_tar(tmp_path / "a.tar", [("a.zip", stream.getvalue()), ("b.pkl", b"cos\nsystem\n")])
    assert walk_tar(path).names == ["a.zip", "b.pkl"]


def test_payloads_larger_than_the_window_are_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.bin", bytes(1 << 20)) for i in range(5)] + PLAIN)
    with tarfile.open(path) as tar:
        assert list(walk_tar(path).offsets) == [member.offset_data for member in tar]


def test_a_missing_file_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        walk_tar(tmp_path / "none.tar")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_in_a_header_never_passes_for_another_tar(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flip") / "a.tar"
    good = write_tar(path, PLAIN).read_bytes()
    before = walk_tar(path)
    start = data.draw(st.sampled_from([offset - 512 for offset in before.offsets]))
    at = start + data.draw(st.integers(0, 511))
    bit = 1 << data.draw(st.integers(0, 7))
    path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
    try:
        after = walk_tar(path)
    except TarRefusedError:
        return
    # Only blanks and zeros around the checksum's digits may change without a trace.
    assert start + 148 <= at < start + 156
    assert (after.names, after.offsets, after.sizes) == (before.names, before.offsets, before.sizes)


def test_a_sparse_bomb_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar"
    with path.open("wb") as file:
        file.write(header(size=b"\x80" + (1 << 34).to_bytes(11, "big")))
        file.truncate(1 << 35)
    code = f"""
import resource, sys
from pathlib import Path
from dstrain.foreign.refusal import TarRefusedError
from dstrain.foreign.tar_walk import walk_tar
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    walk_tar(Path({str(path)!r}))
except TarRefusedError as refusal:
    print(refusal.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    reason, grown = done.stdout.split()
    assert reason == "oversized"
    assert int(grown) < resource.getpagesize() * 1024  # KiB: 4 MiB on most machines
