from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.data.manifest import content_fingerprint, read_manifest


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    shutil.copy(shards / "train" / "manifest.json", tmp_path)
    return tmp_path


def edit(folder: Path, *, sign: bool = True, **changes) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    shard = changes.pop("shard", {})
    data |= changes
    data["shards"][0] |= shard
    if sign:
        data["fingerprint"] = content_fingerprint(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def test_a_written_manifest_reads_back_and_provenance_leaves_the_fingerprint_alone(folder):
    before = read_manifest(folder)
    edit(folder, sign=False, provenance={"moved": True})
    after = read_manifest(folder)
    assert after.fingerprint == before.fingerprint
    assert after.shards == before.shards
    assert after.provenance == {"moved": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": {"name": "../evil.tar"}}, "not a plain shard file name"),
        ({"shard": {"name": "/abs.tar"}}, "not a plain shard file name"),
        ({"shard": {"name": "a..tar"}}, "not a plain shard file name"),
        ({"shard": {"name": "x\n.tar"}}, "not a plain shard file name"),
        ({"shard": {"sha256": "00"}}, r"shards\.0\.sha256"),
        ({"shard": {"bytes": -1}}, r"shards\.0\.bytes"),
        ({"shard": {"blocks": 0}}, r"shards\.0\.blocks"),
        ({"dtype": "object"}, "dtype"),
        ({"vocab_size": 70000}, "does not fit uint16"),
        ({"vocab_size": 3}, "special id is not below vocab_size"),
        ({"vocab_size": "300"}, "vocab_size"),
        ({"num_tokens": 1}, "num_tokens is 1, but the shards add up to"),
        ({"surprise": 1}, "surprise"),
        ({"format_version": 2}, "format_version is 2, this dstrain reads 1"),
    ],
)
def test_a_manifest_that_breaks_a_bound_is_refused_by_key(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(folder)
    assert str(folder / "manifest.json") in str(caught.value)


def test_an_edited_manifest_is_refused_by_its_fingerprint(folder):
    edit(folder, sign=False, frame_prefix=[7])
    with pytest.raises(DataError, match="edited or damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(folder)


def test_a_missing_manifest_says_where_datasets_are(shards, tmp_path):
    with pytest.raises(DataError, match=r"holds the datasets train and validation"):
        read_manifest(shards)
    with pytest.raises(DataError, match=r"no complete dataset.*dstrain shards build"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match=r"no such dataset folder.*dstrain shards build"):
        read_manifest(tmp_path / "none")
