"""DALI's `.idx` files, as `wds2idx` writes them: text, with place, size and name of every member.

Layout, version v1.2: a first line `v1.2 <samples>`, then a line for each sample with four fields for each member:
extension, payload offset, size, name. Names with spaces make a line ambiguous; such a file is refused.
"""

from __future__ import annotations

from pathlib import Path

from dstrain.base.errors import DataError
from dstrain.foreign.samples import Samples
from dstrain.foreign.tar_walk import Members

_VERSION = b"v1.2"
_LIMIT_BYTES = 1 << 30


def find_dali(shard: Path) -> Path | None:
    """The DALI index beside a shard: the shard's name up to its first (or last) dot, with `.idx`."""
    for stem in (shard.name.partition(".")[0], shard.stem):
        path = shard.with_name(f"{stem}.idx")
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(5).rstrip() == _VERSION:
                    return path
    return None


def read_dali(path: Path) -> list[list[tuple[str, int, int, str]]]:
    """(extension, offset, size, name) of each member of each sample.

    Raises:
        DataError: naming file and line.
    """
    if path.stat().st_size > _LIMIT_BYTES:
        raise DataError(f"{path}: larger than {_LIMIT_BYTES} bytes, refused as a DALI index")
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    head = lines[0].split(" ")
    if head[0] != _VERSION.decode() or len(head) != 2 or not head[1].isdecimal():
        raise DataError(f"{path}:1: no DALI index of version v1.2")
    body = lines[1:-1] if lines[-1] == "" else lines[1:]
    if len(body) != int(head[1]):
        raise DataError(f"{path}: says {head[1]} samples and lists {len(body)}: it was cut")
    return [_line(line, f"{path}:{number}") for number, line in enumerate(body, start=2)]


def _line(line: str, place: str) -> list[tuple[str, int, int, str]]:
    fields = line.split(" ")
    if len(fields) % 4:
        raise DataError(f"{place}: {len(fields)} fields, no multiple of four (does a name hold a space?)")
    found = []
    for at in range(0, len(fields), 4):
        extension, offset, size, name = fields[at : at + 4]
        if not (offset.isdecimal() and size.isdecimal() and len(offset) < 20 and len(size) < 20):
            raise DataError(f"{place}: offset {offset!r} or size {size!r} is no number")
        found.append((extension, int(offset), int(size), name))
    return found


def check_dali(path: Path, members: Members, samples: Samples) -> list[tuple[str, str]]:
    """(index, difference) where the index and the shard disagree; the first only.

    Raises:
        DataError: the index cannot be read.
    """
    listed = {offset: (size, extension) for sample in read_dali(path) for extension, offset, size, _ in sample}
    sizes = dict(zip(members.offsets, members.sizes))
    for offset, (size, _) in listed.items():
        if sizes.get(offset) != size:
            has = f"one of {sizes[offset]}" if offset in sizes else "none"
            return [(str(path), f"says a member of {size} bytes begins at byte {offset}, where the shard has {has}")]
    for key, part in zip(samples.keys, samples.parts):
        for extension, number in part.items():
            entry = listed.get(members.offsets[number])
            if entry is None:
                return [(str(path), f"does not list the member {key}.{extension}")]
            if entry[1].lower() != extension:
                return [(str(path), f"gives the member {key}.{extension} the extension {entry[1]!r}")]
    return []
