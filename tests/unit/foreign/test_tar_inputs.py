from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.foreign.tar_inputs import find_tars


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.tar", "deep/a.tar", ".hidden/x.tar", "c.tar.gz", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_is_searched_deeply(folder: Path) -> None:
    root, shards = find_tars([folder])
    assert root == folder
    assert [shard.relative_to(root).as_posix() for shard in shards] == ["b.tar", "deep/a.tar"]


def test_shards_that_dstrain_wrote_into_the_folder_are_left_out(folder: Path) -> None:
    (folder / "shards/train").mkdir(parents=True)
    for name in ("blocks.idx", "shard-000000.tar"):
        (folder / "shards/train" / name).write_bytes(b"")
    assert len(find_tars([folder])[1]) == 2


def test_files_lie_under_their_common_folder(folder: Path) -> None:
    root, shards = find_tars([str(folder / "deep/a.tar"), str(folder / "b.tar"), str(folder / "b.tar")])
    assert root == folder
    assert len(shards) == 2
    assert find_tars([folder / "deep/a.tar"])[0] == folder / "deep"


@pytest.mark.parametrize("text", ["pipe:curl x", "s3://bucket/a.tar", "http://host/a.tar"])
def test_commands_and_urls_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="commands and URLs are refused"):
        find_tars([text])


def test_nothing_found_says_so(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_tars([folder / "none"])
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \*\.tar found"):
        find_tars([folder / "empty"])
