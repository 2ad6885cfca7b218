from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import DataError
from dstrain.foreign.importers import check_shard, find_indexes
from dstrain.foreign.samples import group_samples
from dstrain.foreign.tar_walk import walk_tar
from tests.support.foreign_tars import write_tar

TEXTS = [("k/0.cls", b"1"), ("k/0.txt", b"one"), ("k/1.cls", b"2"), ("k/1.TXT", b"two" * 300)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_tar(tmp_path / "set/b.tar", [("z.txt", b"z")])
    return write_tar(tmp_path / "set/a.tar", TEXTS)


def check(shard: Path, wids: Path | None = None, *, search: bool = True) -> tuple[str, ...]:
    root = shard.parent
    found = find_indexes(root, sorted(root.glob("*.tar")), wids=wids, search=search)
    members = walk_tar(shard)
    check_shard(found, shard, members, group_samples(members, source=str(shard)))
    found.check_digest(shard)
    return found.names


def tar_members(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


# --- wids ----------------------------------------------------------------------------------------------------------


def write_wids(shard: Path, **changes: Any) -> Path:
    data = shard.read_bytes()
    entry = {"url": f"https://bucket/x/set/{shard.name}", "nsamples": 2, "filesize": len(data)}
    entry |= {"md5sum": hashlib.md5(data).hexdigest(), **changes}
    path = shard.parent / "list.json"
    path.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [entry]}))
    return path


def test_a_wids_list_that_agrees_is_found(shard: Path) -> None:
    path = write_wids(shard)
    assert check(shard) == (str(path),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nsamples": 3}, "says 3 samples, the shard has 2"),
        ({"filesize": 512}, "says 512 bytes"),
        ({"md5sum": "0" * 32}, "its MD5 is"),
        ({"url": "https://bucket/other.tar"}, "lists the shard"),
        ({"nsamples": "two"}, "damaged wids shard list"),
        ({"md5sum": "../../x"}, "damaged wids shard list"),
    ],
)
def test_a_wids_list_that_disagrees_names_both(shard: Path, changes: dict[str, Any], message: str) -> None:
    write_wids(shard, **changes)
    with pytest.raises(DataError, match=message) as caught:
        check(shard)
    assert "list.json" in str(caught.value)
    check(shard, search=False)


def test_a_named_list_is_used_wherever_it_lies(shard: Path, tmp_path: Path) -> None:
    path = write_wids(shard, nsamples=7).rename(tmp_path / "named.json")
    with pytest.raises(DataError, match="says 7 samples"):
        check(shard, path, search=False)
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(DataError, match="no wids shard list"):
        check(shard, other)


# --- DALI ----------------------------------------------------------------------------------------------------------


def write_dali(shard: Path, *, change: tuple[str, str] = ("", ""), samples: int = 2) -> None:
    rows: dict[str, list[str]] = {}
    for member in tar_members(shard):
        key, _, extension = member.name.partition(".")
        rows.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
    text = f"v1.2 {samples}\n" + "".join(" ".join(parts) + "\n" for parts in rows.values())
    (shard.with_suffix(".idx")).write_text(text.replace(*change))


def test_a_dali_index_that_agrees_is_found(shard: Path) -> None:
    write_dali(shard)
    assert check(shard) == (str(shard.with_suffix(".idx")),)


@pytest.mark.parametrize(
    ("change", "samples", "message"),
    [
        ((" 512 ", " 1024 "), 2, "begins at byte 1024, where the shard has none"),
        ((" 3 ", " 4 "), 2, "member of 4 bytes begins"),
        (("txt", "text"), 2, "the extension 'text'"),
        (("", ""), 3, "says 3 samples and lists 2"),
        ((" 900 k/1.TXT", ""), 2, "no multiple of four"),
        ((" 900 ", " x "), 2, "is no number"),
    ],
)
def test_a_dali_index_that_disagrees_names_both(
    shard: Path, change: tuple[str, str], samples: int, message: str
) -> None:
    write_dali(shard, change=change, samples=samples)
    with pytest.raises(DataError, match=message) as caught:
        check(shard)
    assert "a.idx" in str(caught.value)


def test_another_programs_idx_is_left_alone(shard: Path) -> None:
    shard.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00")
    assert check(shard) == ()


# --- Energon -------------------------------------------------------------------------------------------------------


def write_energon(shard: Path, *, counts: dict[str, int] | None = None, sql: str = "", offset: int = 0) -> None:
    meta = shard.parent / ".nv-meta"
    meta.mkdir()
    counts = counts if counts is not None else {"b.tar": 1, "a.tar": 2}
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.0", "shard_counts": counts}))
    (meta / "dataset.yaml").write_text("!!python/object/apply:os.system ['false']")
    members = tar_members(shard)
    offsets = [members[0].offset + offset, members[2].offset, members[3].offset_data + 1024]
    Path(f"{shard}.idx").write_bytes(struct.pack("<3Q", *offsets))
    with sqlite3.connect(meta / "index.sqlite") as db:
        db.execute(
            "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, "
            "sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)"
        )
        db.execute(
            "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, "
            "content_byte_offset INTEGER, content_byte_size INTEGER)"
        )
        for index, key in enumerate(("k/0", "k/1")):
            db.execute("INSERT INTO samples VALUES (1, ?, ?, ?, 0)", (key, index, members[2 * index].offset))
            for member in members[2 * index : 2 * index + 2]:
                part = (index, member.name.partition(".")[2], member.offset_data, member.size)
                db.execute("INSERT INTO sample_parts VALUES (1, ?, ?, ?, ?)", part)
        db.executescript(sql)
    db.close()


def test_energons_metadata_that_agree_are_found(shard: Path) -> None:
    write_energon(shard)
    assert check(shard) == (str(shard.parent / ".nv-meta"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": {"a.tar": 3, "b.tar": 1}}, r"\.info\.json, which says 3 samples"),
        ({"counts": {"b.tar": 1}}, "does not list this shard"),
        ({"counts": {"a.tar": 2, "b.tar": 1, "c.tar": 1}}, "lists the shard 'c.tar'"),
        ({"counts": {"a.tar": "2"}}, "must map shard names to sample counts"),
        ({"offset": 512}, r"a\.tar\.idx, which puts sample 0 at byte 512"),
        ({"sql": "UPDATE samples SET sample_key = 'x' WHERE sample_index = 0"}, "lists other samples"),
        ({"sql": "UPDATE sample_parts SET content_byte_size = 9 WHERE sample_index = 1"}, "lists other members"),
        ({"sql": "DELETE FROM samples WHERE sample_index = 1"}, "lists other samples: 'fewer'"),
        ({"sql": "UPDATE samples SET byte_offset = 'x' WHERE sample_index = 1"}, "other types"),
        ({"sql": "DROP TABLE samples"}, "no table 'samples'"),
        (
            {"sql": "ALTER TABLE samples RENAME TO s; CREATE VIEW samples AS SELECT * FROM s"},
            "no table 'samples'",
        ),
    ],
)
def test_energons_metadata_that_disagree_name_both(shard: Path, arguments: dict[str, Any], message: str) -> None:
    write_energon(shard, **arguments)
    with pytest.raises(DataError, match=message) as caught:
        check(shard)
    assert "nv-meta" in str(caught.value) or "a.tar.idx" in str(caught.value)


def test_a_damaged_database_is_a_message(shard: Path) -> None:
    write_energon(shard)
    (shard.parent / ".nv-meta/index.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(DataError, match="cannot be read as an Energon index"):
        check(shard)


def test_an_offset_list_of_another_length_is_refused(shard: Path) -> None:
    Path(f"{shard}.idx").write_bytes(struct.pack("<Q", 0))
    with pytest.raises(DataError, match="lists 1 offsets, the shard has 2 samples"):
        check(shard)
    Path(f"{shard}.idx").write_bytes(bytes(8 * 100))
    with pytest.raises(DataError, match="800 bytes"):
        check(shard)
