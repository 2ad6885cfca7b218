"""Eight kinds of damage at random places, and hostile tars: never a wrong token, never a file or process of theirs (P16, P17)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.index import IndexConfig, index_tars
from dstrain.foreign.tar_walk import walk_tar
from tests.support.foreign_tars import npy, npy_set, text_set, write_tar

HTML = b"<html><head><title>404 Not Found</title></head><body>Not Found</body></html>"


def flip(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def damage(kind: str, path: Path, rng: random.Random) -> None:
    members, data = walk_tar(path), path.read_bytes()
    pick = rng.randrange(1, len(members.names))
    start, offset, size = members.starts[pick], members.offsets[pick], members.sizes[pick]
    inside = offset + rng.randrange(size)
    path.write_bytes(
        {
            "cut at a member": lambda: data[:start],
            "cut in a header": lambda: data[: start + rng.randrange(1, 512)],
            "cut in a payload": lambda: data[: inside + 1],
            "flipped in a header": lambda: flip(data, start + rng.randrange(512), rng),
            "flipped in a payload": lambda: flip(data, inside, rng),
            "zeroed header": lambda: data[:start] + bytes(512) + data[start + 512 :],
            "empty": lambda: b"",
            "web page": lambda: HTML,
        }[kind]()
    )


KINDS = [
    "cut at a member", "cut in a header", "cut in a payload", "flipped in a header", "flipped in a payload",
    "zeroed header", "empty", "web page",
]  # fmt: skip


def refusal_of(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except DataError as error:
        return str(error)
    return None


def check_tokens(dataset: ForeignDataset, block: int, expected: list[int]) -> None:
    assert dataset.read(block).tokens.tolist() == expected


def read_all(path: Path) -> list[list[int]]:
    dataset = ForeignDataset(path, check_shards=False)
    return [dataset.read(block).tokens.tolist() for block in range(len(dataset.blocks))]


@pytest.mark.parametrize("form", ["text", "npy"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_after_indexing_never_gives_a_token(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, kind: str, form: str
) -> None:
    rng = random.Random(f"{kind}|{form}")
    if form == "text":
        shards = text_set(tmp_path / "s", texts, shards=2)
    else:
        shards = npy_set(tmp_path / "s", [[5 + i % 90] * (3 + i) for i in range(60)], shards=2)
    config = IndexConfig(text_field="txt" if form == "text" else None, block_tokens=256, validation_fraction=0)
    report = index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=config, quiet=True)
    good, whole = read_all(report.path / "train"), shards[1].read_bytes()
    for _ in range(12):
        damage(kind, shards[1], rng)
        if kind in ("cut at a member", "cut in a header", "cut in a payload", "empty", "web page"):
            with pytest.raises(DataError, match=r"01\.tar: \d+ bytes, the index says"):
                ForeignDataset(report.path / "train")
        dataset = ForeignDataset(report.path / "train", check_shards=False)
        refused = 0
        for block, tokens in enumerate(good):
            refusal = refusal_of(partial(check_tokens, dataset, block, tokens))
            assert refusal is None or "01.tar" in refusal
            refused += refusal is not None
        assert refused >= 1
        dataset.close()
        shards[1].write_bytes(whole)
    assert read_all(report.path / "train") == good


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "flipped in a payload"])
def test_damage_before_indexing_is_refused(tmp_path: Path, tokenizer_folder: Path, kind: str) -> None:
    rng = random.Random(kind)
    shards = npy_set(tmp_path / "s", [[5 + i % 90] * (3 + i) for i in range(60)], shards=2)
    whole = shards[1].read_bytes()
    blanks = 0
    for _ in range(12):
        damage(kind, shards[1], rng)
        refusal = refusal_of(lambda: walk_tar(shards[1]))
        assert refusal is None or "01.tar: refused" in refusal
        blanks += refusal is None  # a blank beside the checksum's digits, which means nothing
        shards[1].write_bytes(whole)
    assert blanks <= (2 if kind == "flipped in a header" else 0)


def hostile_sets() -> dict[str, Callable[[Path], Any]]:
    def header_lie(path: Path) -> None:
        data = bytearray(write_tar(path, [("a.npy", npy(np.zeros(8, "<u2")))]).read_bytes())
        data[512 + 10 : 512 + 80] = data[512 + 10 : 512 + 80].replace(b"(8,), }  ", b"(8888,), }")[:70]
        path.write_bytes(data)

    bomb = b"{'descr': '<u2', 'fortran_order': False, 'shape': (" + b"(" * 400 + b"), }"
    return {
        "pickle named as text": lambda p: write_tar(p, [("a.pkl", b"cposix\nsystem\n(S'touch OWNED'\ntR.")]),
        "traversal": lambda p: write_tar(p, [("a.txt", b"x"), ("../../OWNED.txt", b"x")]),
        "absolute": lambda p: write_tar(p, [("a.txt", b"x"), ("/tmp/OWNED.txt", b"x")]),
        "object array": lambda p: write_tar(p, [("a.npy", npy(np.array([print], dtype=object)))]),
        "npy size lie": header_lie,
        "npy header bomb": lambda p: write_tar(p, [("a.npy", b"\x93NUMPY\x01\x00\xc7\x01" + bomb)]),
        "json bomb": lambda p: write_tar(p, [("a.json", b"[" * (6 << 20))]),
        "wide json": lambda p: write_tar(p, [("a.json", b'{"text":[' + b"[]," * (1 << 21) + b"[]]}")]),
        "oversized": lambda p: write_tar(p, [("a.txt", bytes(65 << 20))]),
        "wrong vocabulary": lambda p: write_tar(p, [("a.npy", npy(np.array([60000], "<u2")))]),
        "shell in the name": lambda p: write_tar(p, [("$(touch OWNED).txt", b"\xff")]),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, dict[str, Any]]:
    """What one process that indexes every hostile set does, under an audit hook."""
    folder = tmp_path_factory.mktemp("hostile")
    for kind, write in hostile_sets().items():
        write(folder / f"{kind}/a.tar")
    code = """
        import json, os, resource, sys
        from pathlib import Path
        from dstrain.base.errors import DataError
        from dstrain.foreign.index import IndexConfig, index_tars
        from dstrain.data.tokenizer import Tokenizer
        tokenizer, kinds = Path(sys.argv[1]), sys.argv[2:]
        Tokenizer.load(tokenizer).encode_documents(["warm"])
        seen = []
        def watch(event, args):
            if event in ("subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class"):
                seen.append(f"{event} {args}"[:200])
            if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
                if not os.path.abspath(os.fsdecode(args[0])).startswith(os.getcwd()):
                    seen.append(f"{event} {args}"[:200])
        sys.addaudithook(watch)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {}
        for kind in kinds:
            before, message = peak(), None
            del seen[:]
            try:
                index_tars([kind], tokenizer=tokenizer, out=Path("out"), overwrite=True, quiet=True,
                           config=IndexConfig(validation_fraction=0))
            except DataError as error:
                message = str(error)
            found[kind] = {"message": message, "grown": peak() - before, "seen": list(seen)}
        print(json.dumps(found))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tokenizer_folder), *hostile_sets()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    owned = [path for path in folder.rglob("*") if "OWNED" in path.name]
    assert owned == []
    return found


@pytest.mark.parametrize("kind", sorted(hostile_sets()))
def test_hostile_sets_are_refused_without_a_trace(outcomes: dict[str, dict[str, Any]], kind: str) -> None:
    outcome = outcomes[kind]
    assert outcome["message"] is not None
    assert "a.tar" in outcome["message"]
    assert outcome["seen"] == []
    assert outcome["grown"] < 2 * (64 << 10), "KiB: twice the largest member"
