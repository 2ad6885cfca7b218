"""P16, P17: all kinds of damage at random places, and shards made to harm: never a wrong token, no process, no file, bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from dstrain.base.errors import DataError
from dstrain.data.block_index import RECORD, ends_checksum
from dstrain.data.manifest import content_fingerprint
from dstrain.data.reader import ShardDataset
from tests.support.block_shards import write_random_shards
from tests.support.runs import ROOT


@pytest.fixture(scope="module", params=["none", "zstd"])
def sound(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "d"
    return write_random_shards(folder, documents=60, block_tokens=4096, shard_bytes=1 << 15, compression=request.param)


def tokens_of(folder: Path) -> list[bytes]:
    dataset = ShardDataset(folder)
    return [dataset.read(block).tokens.tobytes() for block in range(dataset.manifest.num_blocks)]


def tokens_or_refusal(dataset: ShardDataset, block: int) -> bytes | str:
    try:
        return dataset.read(block).tokens.tobytes()
    except DataError as error:
        return str(error)


def flip(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


Damage = Callable[[bytes, random.Random, np.ndarray], bytes]
KINDS: dict[str, Damage] = {
    "cut at a member": lambda data, draw, r: data[: int(draw.choice(r)["off"]) - 512],
    "cut in a header": lambda data, draw, r: data[: int(draw.choice(r)["off"]) - draw.randint(1, 511)],
    "cut in a payload": lambda data, draw, r: data[: int(draw.choice(r)["off"]) + draw.randint(1, 1000)],
    "flipped in a header": lambda data, draw, r: flip(data, int(draw.choice(r)["off"]) - draw.randint(1, 512)),
    "flipped in a payload": lambda data, draw, r: flip(data, int(draw.choice(r)["off"]) + draw.randint(0, 2000)),
    "zeroed header": lambda data, draw, r: (
        lambda at: data[: at - 512] + bytes(512) + data[at:]
    )(int(draw.choice(r)["off"])),
    "empty": lambda data, draw, r: b"",
    "not a tar": lambda data, draw, r: (b"<html>404 Not Found</html>" * len(data))[: draw.choice([26, len(data)])],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_wherever_it_is(sound, tmp_path, kind):
    folder = Path(shutil.copytree(sound, tmp_path / "d"))
    truth = tokens_of(folder)
    records = np.array(ShardDataset(folder).blocks)
    draw = random.Random(kind)
    for _ in range(6):
        shard = draw.randrange(len(ShardDataset(sound).manifest.shards))
        path = folder / f"shard-{shard:06d}.tar"
        path.write_bytes(KINDS[kind]((sound / path.name).read_bytes(), draw, records[records["shard"] == shard]))
        dataset = ShardDataset(folder, check_shards=False)
        refused = 0
        for block, expected in enumerate(truth):
            found = tokens_or_refusal(dataset, block)
            assert found == expected or (isinstance(found, str) and path.name in found)
            refused += isinstance(found, str)
        assert refused >= 1
        shutil.copy(sound / path.name, path)
    assert tokens_of(folder) == truth  # no false alarm


def test_single_bits_anywhere_are_found_or_harmless(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "d"))
    truth = tokens_of(folder)
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    dataset = ShardDataset(folder)
    inside = np.flatnonzero(dataset.blocks["shard"] == 1).tolist()
    begin = [int(dataset.blocks[b]["off"]) - int(dataset.blocks[b]["ends_off"]) for b in inside]
    end = [int(dataset.blocks[b]["off"]) + int(dataset.blocks[b]["len"]) for b in inside]
    draw = random.Random(1)
    for _ in range(150):
        place = draw.randrange(len(data))
        path.write_bytes(flip(data, place, draw.randrange(8)))
        for block, first, last in zip(inside, begin, end):
            if first <= place < last:
                with pytest.raises(DataError, match=f"block {block} is damaged"):
                    dataset.read(block)
            else:
                assert dataset.read(block).tokens.tobytes() == truth[block]


def rewrite(folder: Path, payload: bytes, *, flags: int, **fields: int) -> None:
    """Put a payload of an attacker's choice into block 0, with index, hashes and fingerprint all consistent."""
    shard = folder / "shard-000000.tar"
    records = np.fromfile(folder / "blocks.idx", dtype=RECORD)
    first = records[0]
    data = bytearray(shard.read_bytes())
    off, ends_off = int(first["off"]), int(first["ends_off"])
    if not flags:
        payload = payload.ljust(int(first["len"]), b"\0")
        assert len(payload) == int(first["len"])
    data[off : off + len(payload)] = payload
    lead = bytes(data[off - ends_off : off])
    first["len"] = len(payload)
    for name, value in fields.items():
        first[name] = value
    first["crc32"] = zlib.crc32(payload, zlib.crc32(lead))
    first["flags"] = ends_checksum(lead[:-512]) << 16 | flags
    shard.write_bytes(data)
    (folder / "blocks.idx").write_bytes(records.tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256(records.tobytes()).hexdigest()
    manifest["fingerprint"] = content_fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def npy(array: np.ndarray, *, pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=pickle)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(bytes(size))


HOSTILE: dict[str, tuple[bytes, dict[str, int], str]] = {
    "pickle": (npy(np.array([Evil()] * 50, dtype=object), pickle=True), {}, "npy header says object"),
    "zip": (b"PK\x03\x04" + bytes(3000), {}, "magic string"),
    "huge header": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 3000, {}, "unknown npy version"),
    "long header": (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 3000, {}, "block 0 is damaged"),
    "code in header": (
        b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').system('touch pwned')".ljust(117) + b"\n" + bytes(3000),
        {}, "block 0 is damaged",
    ),
    "id beyond the vocabulary": (b"all", {}, "is not below vocab_size 30000"),
    "bomb that declares itself": (bomb(1 << 30), {"flags": 1, "raw_len": 64 << 20}, "declares 1073741824 bytes"),
    "bomb that hides": (
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28)),
        {"flags": 1}, "zstd frame declares",
    ),
    "no frame": (b"x" * 3000, {"flags": 1}, "block 0 is damaged"),
}  # fmt: skip

GUARDED = """
import os, resource, sys
import dstrain.data.reader
import zstandard.backend_c
from dstrain.base.errors import DataError
seen = []
def audit(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "exec",
                 "socket.connect", "os.remove", "os.rename"):
        seen.append((event, str(arguments)[:200]))
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(audit)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    dstrain.data.reader.ShardDataset(sys.argv[1]).read(0)
    said = "delivered"
except DataError as error:
    said = str(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(said); print(grown); print(seen)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_blocks_are_refused_without_harm(tmp_path, name):
    payload, fields, message = HOSTILE[name]
    folder = write_random_shards(tmp_path / "d", documents=90, block_tokens=65_000, shard_bytes=1 << 18)
    if payload == b"all":
        payload = npy(np.full(int(ShardDataset(folder).blocks[0]["tokens"]), 65_535, dtype="<u2"))
    rewrite(folder, payload, **{"flags": 0, **fields})
    before = {path for path in tmp_path.rglob("*")}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    said, grown, seen = done.stdout.splitlines()[-3:]
    assert message in said
    assert int(grown) < 128 << 10  # KiB: twice the largest member
    assert seen == "[]"
    assert {path for path in tmp_path.rglob("*")} == before
    assert not (ROOT / "pwned").exists()
