from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.foreign import manifest as manifest_module
from dstrain.foreign.index import IndexConfig, IndexReport, index_tars
from dstrain.foreign.manifest import BLOCK, SAMPLE, content_fingerprint, read_manifest, read_tables
from tests.support.foreign_tars import write_tar


@pytest.fixture
def split(foreign_index: IndexReport, tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign_index.path / "train", tmp_path / "train"))


def edit(split: Path, *, keep_fingerprint: bool = False, **changes: Any) -> None:
    data = json.loads((split / "manifest.json").read_text())
    data |= changes
    if not keep_fingerprint:
        data["fingerprint"] = content_fingerprint(data)
    (split / "manifest.json").write_text(json.dumps(data))


def edit_table(split: Path, name: str, dtype: np.dtype[Any], field: str, row: int, value: int) -> None:
    """As a forger would: the hashes in the manifest follow."""
    table = np.fromfile(split / name, dtype=dtype)
    table[field][row] = value
    (split / name).write_bytes(table.tobytes())
    key = "samples_sha256" if name == "samples.idx" else "index_sha256"
    edit(split, **{key: hashlib.sha256(table.tobytes()).hexdigest()})


def test_a_sound_index_is_read(split: Path) -> None:
    manifest = read_manifest(split)
    samples, blocks = read_tables(split, manifest)
    assert len(samples) == manifest.num_documents
    assert blocks["tokens"].sum() == manifest.num_tokens
    assert (SAMPLE.itemsize, BLOCK.itemsize) == (20, 32)


def test_the_place_of_the_shards_is_no_part_of_the_fingerprint(split: Path) -> None:
    before = read_manifest(split).fingerprint
    edit(split, keep_fingerprint=True, root="/elsewhere")
    assert read_manifest(split).fingerprint == before


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"format_version": 2},
        {"num_tokens": 1},
        {"vocab_size": 3},
        {"extra": 1},
        {"dtype": "object"},
        {"member": {"extension": "txt", "form": "pickle", "field": None}},
        {"shards": [{"name": "../x.tar", "bytes": 1, "sha256": "0" * 64, "blocks": 0, "tokens": 0, "documents": 0}]},
        {"shards": [{"name": "/x.tar", "bytes": 1, "sha256": "0" * 64, "blocks": 0, "tokens": 0, "documents": 0}]},
        {"shards": [{"name": "pipe:x", "bytes": 1, "sha256": "0" * 64, "blocks": 0, "tokens": 0, "documents": 0}]},
    ],
)
def test_a_manifest_that_breaks_a_bound_is_refused(split: Path, changes: dict[str, Any]) -> None:
    edit(split, **changes)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(split)


def test_an_edited_manifest_is_noticed(split: Path) -> None:
    edit(split, keep_fingerprint=True, frame_prefix=[])
    with pytest.raises(DataError, match="fingerprint is not that of the content"):
        read_manifest(split)


@pytest.mark.parametrize("name", ["samples.idx", "blocks.idx"])
def test_a_changed_table_is_noticed(split: Path, name: str) -> None:
    data = bytearray((split / name).read_bytes())
    data[5] ^= 1
    (split / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        read_tables(split, read_manifest(split))


@pytest.mark.parametrize(
    ("name", "field", "row", "value", "problem"),
    [
        ("samples.idx", "off", 0, (1 << 63) - 1, "beyond all files"),
        ("samples.idx", "off", 1, 512, "overlap"),
        ("samples.idx", "len", 0, 1 << 31, "overlap"),
        ("samples.idx", "len", -1, 1 << 31, "outside their shard"),
        ("samples.idx", "tokens", 0, 1 << 30, "do not add up"),
        ("blocks.idx", "begin", 1, 0, "outside their shard"),
        ("blocks.idx", "begin", 1, (1 << 63) - 1, "beyond all files"),
        ("blocks.idx", "first", 1, 0, "no partition"),
        ("blocks.idx", "samples", 0, 0, "no partition"),
        ("blocks.idx", "shard", 0, 2, "out of order"),
        ("blocks.idx", "shard", -1, 9, "unknown"),
        ("blocks.idx", "tokens", 0, 7, "do not add up"),
    ],
)
def test_forged_tables_are_refused(split: Path, name: str, field: str, row: int, value: int, problem: str) -> None:
    edit_table(split, name, SAMPLE if name == "samples.idx" else BLOCK, field, row, value)
    with pytest.raises(DataError, match=problem):
        read_tables(split, read_manifest(split))


def test_what_lies_between_distant_members_does_not_count_as_read(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [(f"{i}.{kind}", data) for i in range(30) for kind, data in (("jpg", bytes(60_000)), ("txt", b"a fox"))]
    write_tar(tmp_path / "s/a.tar", members)
    config = IndexConfig(validation_fraction=0)
    folder = index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=config, quiet=True).path / "train"
    monkeypatch.setattr(manifest_module, "MAX_BLOCK_BYTES", 30 * 1024)
    assert len(read_tables(folder, read_manifest(folder))[1]) == 1
    monkeypatch.setattr(manifest_module, "MAX_BLOCK_BYTES", 30 * 1024 - 513)
    with pytest.raises(DataError, match="larger than a block may be"):
        read_tables(folder, read_manifest(folder))


@pytest.mark.parametrize("together", [1, 7, 40])
def test_tables_are_checked_in_parts(split: Path, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_CHECKED_TOGETHER", together)
    samples, _ = read_tables(split, read_manifest(split))
    edit_table(split, "samples.idx", SAMPLE, "len", len(samples) // 2, 1 << 30)
    with pytest.raises(DataError, match="overlap"):
        read_tables(split, read_manifest(split))
