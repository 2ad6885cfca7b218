"""The last act: nothing gets a checkpoint's name unless it is whole and the run is still ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import CheckpointError, RunInUseError
from dstrain.base.file_operations import FileOperations, operations_replaced
from dstrain.checkpoint.layout import staging_folder
from dstrain.checkpoint.publish import Contents, publish
from dstrain.checkpoint.rank_file import Part, write_part
from dstrain.checkpoint.reader import Checkpoint
from dstrain.checkpoint.snapshot import Snapshot
from tests.support.tiny_checkpoints import content, fragments_of, manifest_of, save, state_of


def staged(folder: Path, step: int = 4) -> tuple[Path, list[Part]]:
    staging = staging_folder(folder, step, "ab")
    staging.mkdir(parents=True)
    snapshot = Snapshot()
    snapshot.take(fragments_of(state_of(step)))
    path = staging / "rank-00000-of-00001.safetensors"
    return staging, [write_part(path, snapshot, verify=True, cancelled=lambda: False)]


def contents(step: int = 4, **fields: object) -> Contents:
    return Contents(manifest_of(step, **fields), "a: 1\n", None)


def nobody() -> None:
    pass


def test_the_manifest_says_whether_everything_was_read_back(tmp_path: Path) -> None:
    for name, verify in (("a", True), ("b", False)):
        staging, parts = staged(tmp_path / name)
        size = publish(staging, tmp_path / name, contents(), parts, verify=verify, check_owner=nobody)
        manifest = Checkpoint(tmp_path / name / "step-00000004").manifest
        assert manifest.read_back is verify
        assert size == sum(entry.size_bytes for entry in manifest.files.values())


def test_what_health_wants_to_remember_is_kept(tmp_path: Path) -> None:
    staging, parts = staged(tmp_path)
    publish(staging, tmp_path, contents(health={"interval": {"cost_s": 0.5}}), parts, verify=True, check_owner=nobody)
    assert Checkpoint(tmp_path / "step-00000004").manifest.health == {"interval": {"cost_s": 0.5}}


def test_a_paused_former_owner_publishes_nothing_and_moves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = content(tmp_path / "step-00000004")
    staging, parts = staged(tmp_path)

    def taken() -> None:
        raise RunInUseError("taken over")

    with pytest.raises(RunInUseError):
        publish(staging, tmp_path, contents(), parts, verify=True, check_owner=taken)
    assert content(tmp_path / "step-00000004") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [staging.name, "step-00000004"]


def test_the_owner_is_asked_after_everything_else_immediately_before_the_rename(tmp_path: Path) -> None:
    staging, parts = staged(tmp_path)
    seen: list[str] = []

    class Watched(FileOperations):
        def write(self, handle: int, data: memoryview) -> int:
            seen.append("write")
            return super().write(handle, data)

        def rename(self, source: Path, target: Path) -> None:
            seen.append("publish" if source == staging else "rename")
            super().rename(source, target)

    with operations_replaced(Watched()):
        publish(staging, tmp_path, contents(), parts, verify=True, check_owner=lambda: seen.append("asked"))
    assert seen[-2:] == ["asked", "publish"]
    assert seen.count("asked") == seen.count("publish") == 1


@pytest.mark.parametrize(("spoil", "kind"), [(True, "damaged"), (False, "superseded")])
def test_a_folder_of_the_same_step_is_moved_aside_under_a_true_name(tmp_path: Path, spoil: bool, kind: str) -> None:
    old = save(tmp_path, 4)
    if spoil:
        (old / "manifest.json").write_text("garbage")
    before = content(old)
    staging, parts = staged(tmp_path)
    publish(staging, tmp_path, contents(), parts, verify=True, check_owner=nobody)
    aside = [p for p in tmp_path.iterdir() if p.name.startswith(f"{kind}-step-00000004-")]
    assert [content(p) for p in aside] == [before]
    Checkpoint(tmp_path / "step-00000004").verify()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"zero_stage": 9}, "zero_stage"), ({"parameters": {"other": [3]}}, r"other fp32: 0 of 3 elements are stored")],
)
def test_what_a_reader_would_refuse_is_not_published(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    staging, parts = staged(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        publish(staging, tmp_path, contents(**fields), parts, verify=True, check_owner=nobody)
    assert [p.name for p in tmp_path.iterdir()] == [staging.name]


def test_a_part_that_has_vanished_meanwhile_is_noticed(tmp_path: Path) -> None:
    staging, parts = staged(tmp_path)
    (staging / parts[0].name).unlink()
    with pytest.raises(CheckpointError, match="missing, though the manifest lists it"):
        publish(staging, tmp_path, contents(), parts, verify=True, check_owner=nobody)
