from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dstrain.foreign.refusal import TarRefusedError
from dstrain.foreign.samples import group_samples, split_name
from dstrain.foreign.tar_walk import walk_tar

PART = st.sampled_from(["a", "b", "A", "000", "x y", "é", "__m__", "__", "d.e", ".h", "n" * 60])
EXTENSION = st.sampled_from(["txt", "TXT", "json", "meta.json", "seg.png.txt", "", "npy"])
NAME = st.builds(
    lambda folders, base, extension, dot: "/".join([*folders, base + ("." if dot else "") + extension]),
    st.lists(st.one_of(PART, st.just(".")), max_size=4),
    PART,
    EXTENSION,
    st.booleans(),
)
KIND = st.sampled_from([tarfile.REGTYPE] * 9 + [tarfile.AREGTYPE, tarfile.DIRTYPE])
MEMBER = st.tuples(NAME, st.binary(max_size=700), KIND)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
# What only dstrain refuses; anything else must be refused by webdataset too or read alike.
STRICTER = {"split-sample", "duplicate-member", "name", "unknown-type"}


def write_tar(path: Path, members: list[tuple[str, bytes, bytes]], form: int) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = 0 if kind == tarfile.DIRTYPE else len(data)
            try:
                tar.addfile(info, io.BytesIO(data) if info.size else None)
            except ValueError:  # too long for ustar
                continue


def ours(path: Path) -> list[dict[str, Any]]:
    members = walk_tar(path)
    samples = group_samples(members, source=str(path))
    data = path.read_bytes()
    return [
        {"__key__": key, **{e: data[members.offsets[m] :][: members.sizes[m]] for e, m in part.items()}}
        for key, part in zip(samples.keys, samples.parts)
    ]


def theirs(path: Path) -> list[dict[str, Any]]:
    found = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [{k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")} for sample in found]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(MEMBER, max_size=8), form=st.sampled_from(sorted(FORMATS)))
@example(members=[("dir/.hidden", b"1", tarfile.REGTYPE), (".hidden", b"2", tarfile.REGTYPE)], form="ustar")
@example(members=[("__m__/a.txt", b"1", tarfile.REGTYPE), ("__m__.txt", b"2", tarfile.REGTYPE)], form="gnu")
@example(members=[("d" * 90 + "/" + "n" * 90 + ".a.b", b"1", tarfile.REGTYPE)], form="ustar")
@example(members=[("é" * 120 + ".txt", b"1", tarfile.REGTYPE)], form="pax")
@example(members=[("n" * 400 + "/k.txt", b"1", tarfile.REGTYPE)], form="gnu")
def test_samples_are_webdatasets_own_or_refused_by_name(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]], form: str
) -> None:
    path = tmp_path / "fuzz.tar"
    write_tar(path, members, FORMATS[form])
    try:
        found = ours(path)
    except TarRefusedError as refusal:
        if refusal.reason not in STRICTER:
            raise
        return
    assert found == theirs(path)


def test_a_name_splits_at_the_first_dot_of_its_last_part() -> None:
    assert split_name("a.b/c.d.TXT") == ("a.b/c", "d.txt")
    assert split_name("plain") is None
    assert split_name("__meta__/x.json") is None


def test_members_apart_are_refused_where_webdataset_splits_the_sample(tmp_path: Path) -> None:
    path = tmp_path / "apart.tar"
    regular = tarfile.REGTYPE
    write_tar(path, [("a.txt", b"1", regular), ("b.txt", b"2", regular), ("a.json", b"3", regular)], tarfile.GNU_FORMAT)
    assert [sample["__key__"] for sample in theirs(path)] == ["a", "b", "a"]
    with pytest.raises(TarRefusedError, match="'a' are not side by side") as caught:
        ours(path)
    assert caught.value.reason == "split-sample"


def test_one_extension_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    write_tar(path, [("a.txt", b"1", tarfile.REGTYPE), ("a.TXT", b"2", tarfile.REGTYPE)], tarfile.GNU_FORMAT)
    with pytest.raises(TarRefusedError, match="stands twice") as caught:
        ours(path)
    assert caught.value.reason == "duplicate-member"


def test_extensions_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "some.tar"
    names = ["a.txt", "a.json", "b.txt"]
    write_tar(path, [(name, b"1", tarfile.REGTYPE) for name in names], tarfile.GNU_FORMAT)
    assert group_samples(walk_tar(path), source="t").extensions == {"txt": 2, "json": 1}
