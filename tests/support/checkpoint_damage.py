"""Ways in which a checkpoint goes bad on disk: bits, ends, swaps, mixes, losses, forgeries, links, wrong kinds of file.

Each damages one checkpoint folder, given other whole ones to take pieces from, and knows nothing of what should happen then.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def flip_a_bit(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut_the_end(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty_the_file(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    os.truncate(_file(rng, folder), 0)


def fill_with_zeros(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    data = bytearray(path.read_bytes())
    begin = rng.randrange(len(data))
    end = rng.randint(begin + 1, len(data))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def append_junk(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    with open(_file(rng, folder), "ab") as file:
        file.write(rng.randbytes(rng.randint(1, 600)))


def overwrite_with_junk(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    path.write_bytes(rng.randbytes(path.stat().st_size))


def delete_a_file(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    _file(rng, folder).unlink()


def swap_ranks(_rng: random.Random, folder: Path, _others: list[Path]) -> None:
    first, second = sorted(folder.glob("rank-*"))[:2]
    spare = folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def copy_one_rank_over_the_other(_rng: random.Random, folder: Path, _others: list[Path]) -> None:
    first, second = sorted(folder.glob("rank-*"))[:2]
    shutil.copyfile(first, second)


def mix_steps(rng: random.Random, folder: Path, others: list[Path]) -> None:
    """A file of another step, of the same size and name."""
    path = _file(rng, folder, "rank-*")
    shutil.copyfile(rng.choice(others) / path.name, path)


def take_a_stale_manifest(rng: random.Random, folder: Path, others: list[Path]) -> None:
    shutil.copyfile(rng.choice(others) / MANIFEST, folder / MANIFEST)


def take_the_content_of_another_step(rng: random.Random, folder: Path, others: list[Path]) -> None:
    """All files of an older checkpoint under the newest name."""
    shutil.rmtree(folder)
    shutil.copytree(rng.choice(others), folder)


def forge_a_number(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    """Another digit somewhere in the manifest: still JSON, often still sensible."""
    path = folder / MANIFEST
    text = list(path.read_text())
    place = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
    text[place] = rng.choice([d for d in "123456789" if d != text[place]])
    path.write_text("".join(text))


def forget_a_file(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    """A manifest that does not mention one of its files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][rng.choice(sorted(manifest["files"]))]
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def forget_a_field(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[rng.choice(sorted(manifest))]
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def spoil_the_manifest(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    junk = [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 5_000, b"[" * 200_000, b'{"files": 1e999}', b"0" * 5_000]
    (folder / MANIFEST).write_bytes(rng.choice(junk))


def loop_of_links(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    path.unlink()
    path.symlink_to(path.name)


def dangling_link(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def folder_for_a_file(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    path.unlink()
    path.mkdir()


def pipe_for_a_file(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    path = _file(rng, folder)
    path.unlink()
    os.mkfifo(path)


def file_for_the_folder(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(rng.randbytes(8))


def link_for_the_folder(rng: random.Random, folder: Path, _others: list[Path]) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(rng.choice([folder.name, "/nowhere", "/dev/null", "."]))


def empty_folder(_rng: random.Random, folder: Path, _others: list[Path]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


WAYS: tuple[Callable[[random.Random, Path, list[Path]], None], ...] = (
    flip_a_bit, flip_a_bit, flip_a_bit, cut_the_end, cut_the_end, empty_the_file, fill_with_zeros, append_junk,
    overwrite_with_junk, delete_a_file, swap_ranks, copy_one_rank_over_the_other, mix_steps, take_a_stale_manifest,
    take_the_content_of_another_step, forge_a_number, forget_a_file, forget_a_field, spoil_the_manifest, loop_of_links,
    dangling_link, folder_for_a_file, pipe_for_a_file, file_for_the_folder, link_for_the_folder, empty_folder,
)  # fmt: skip
"""All of them; the likely ones more often."""


def _file(rng: random.Random, folder: Path, pattern: str = "**/*") -> Path:
    return rng.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
