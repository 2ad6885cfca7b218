"""A checkpoint of another user is refused before it is read, unless that user is trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dstrain.base.errors import CheckpointError
from dstrain.checkpoint import ownership
from dstrain.checkpoint.ownership import check_owner
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from tests.support.tiny_checkpoints import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path, 3)


def somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is another user than the files' owner, who is not root either."""
    owner, real = os.geteuid() + 1000, Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = list(real(path, follow_symlinks=follow_symlinks))
        found[4] = owner
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)


def test_ones_own_is_read(folder: Path) -> None:
    check_owner(folder, ["manifest.json", "absent"])


def test_another_users_is_refused_with_the_mend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    somebody_else(monkeypatch)
    with pytest.raises(CheckpointError, match=r"belongs to user \d+, not to you .*checkpoint\.trust_owner: true"):
        Checkpoint(folder)
    assert Checkpoint(folder, trust_owner=True).manifest.step == 3
    found = newest_valid(folder.parent)
    assert found.checkpoint is None
    assert "belongs to user" in found.damaged[0][1]
    assert newest_valid(folder.parent, trust_owner=True).checkpoint is not None


def test_a_single_foreign_file_is_enough(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a file away")
    os.chown(folder / "rank-00000-of-00001.safetensors", 12_345, -1)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00001\.safetensors: belongs to user 12345"):
        Checkpoint(folder)


def test_what_others_may_write_is_warned_about_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(ownership._LOG, "warning", lambda text, *values: warnings.append(text % values))
    folder.chmod(0o777)
    (folder / "manifest.json").chmod(0o666)
    for _ in range(2):
        Checkpoint(folder)
    assert len(warnings) == 1
    assert "other users may write here (mode 777)" in warnings[0]
