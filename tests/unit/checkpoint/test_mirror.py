"""The second tier follows behind, keeps its own number, never touches the run, and gives back what the first has lost."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.errors import CheckpointError, StorageError
from dstrain.base.world import World
from dstrain.checkpoint.manifest import CheckpointManifest
from dstrain.checkpoint.mirror import Mirror
from dstrain.checkpoint.mirror_places import FolderPlace
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from dstrain.checkpoint.retention import Kept
from dstrain.checkpoint.writer import CheckpointConfig, CheckpointWriter
from tests.support.tiny_checkpoints import content, fragments_of, manifest_of, save, state_of


class Slow(FolderPlace):
    """Copies only when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.let_go = threading.Event(), threading.Event()

    def put(self, source: Path, manifest: CheckpointManifest) -> None:
        self.begun.set()
        self.let_go.wait()
        super().put(source, manifest)


def mirror_of(folder: Path, *, last: int = 2, every: int | None = None) -> tuple[Mirror, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return Mirror(FolderPlace(folder), kept=Kept(last, every), on_event=events.append), events


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_each_checkpoint_is_copied_and_the_rule_of_the_mirror_is_kept(tmp_path: Path) -> None:
    mirror, events = mirror_of(tmp_path / "m", every=3)
    for step in (1, 2, 3, 4, 5, 6):
        mirror.offer(step, save(tmp_path / "c", step), protect={2})
        assert mirror.wait(30)
    assert names(tmp_path / "m") == [f"step-0000000{step}" for step in (2, 3, 5, 6)]
    assert [e["event"] for e in events] == ["mirrored"] * 6
    assert content(tmp_path / "m" / "step-00000006") == content(tmp_path / "c" / "step-00000006")
    assert events[-1]["size_bytes"] > 0
    assert mirror.close(wait_s=10)


def test_while_one_is_copied_only_the_newest_waits_and_both_are_protected(tmp_path: Path) -> None:
    place = Slow(tmp_path / "m")
    mirror = Mirror(place, kept=Kept(5))
    folders = {step: save(tmp_path / "c", step) for step in (1, 2, 3)}
    mirror.offer(1, folders[1])
    place.begun.wait()
    mirror.offer(2, folders[2])
    mirror.offer(3, folders[3])
    assert mirror.needed() == {1, 3}
    assert not mirror.wait(0.0)
    place.let_go.set()
    assert mirror.wait(30)
    assert mirror.needed() == frozenset()
    assert place.steps() == [3, 1]


def test_a_failure_is_an_event_and_the_next_copy_works(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file where the folder should be")
    mirror, events = mirror_of(tmp_path / "m")
    mirror.offer(1, save(tmp_path / "c", 1))
    assert mirror.wait(30)
    (tmp_path / "m").unlink()
    mirror.offer(2, save(tmp_path / "c", 2))
    assert mirror.wait(30)
    assert [(e["event"], e["step"]) for e in events] == [("mirror_failed", 1), ("mirrored", 2)]
    assert "cannot be written" in events[0]["error"]


def test_a_checkpoint_that_was_damaged_after_its_save_never_replaces_a_copy(tmp_path: Path) -> None:
    mirror, events = mirror_of(tmp_path / "m")
    folder = save(tmp_path / "c", 1)
    (folder / "config.yaml").write_text("seed: 8\n")
    mirror.offer(1, folder)
    assert mirror.wait(30)
    assert events[0]["event"] == "mirror_failed"
    assert names(tmp_path / "m") == []


def test_a_closed_mirror_takes_nothing_more(tmp_path: Path) -> None:
    mirror, events = mirror_of(tmp_path / "m")
    assert mirror.close(wait_s=1)
    mirror.offer(1, save(tmp_path / "c", 1))
    assert mirror.wait(1)
    assert events == []


# --- coming back -----------------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Mirror]:
    """Steps 1 and 2 here and there."""
    mirror, _ = mirror_of(tmp_path / "m")
    for step in (1, 2):
        mirror.offer(step, save(tmp_path / "c", step))
        assert mirror.wait(30)
    return tmp_path / "c", mirror


def newest(folder: Path, mirror: Mirror, **options: Any) -> Checkpoint:
    found = newest_valid(folder, mirror=mirror, **options)
    assert found.checkpoint is not None
    found.checkpoint.verify()
    return found.checkpoint


def test_where_the_local_one_is_as_new_nothing_is_copied(
    both: tuple[Path, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mirror = both
    monkeypatch.setattr(mirror, "fetch", lambda *_: pytest.fail("not needed"))
    assert newest(folder, mirror).manifest.step == 2


def test_a_lost_folder_is_copied_back_whole(both: tuple[Path, Mirror]) -> None:
    folder, mirror = both
    before = content(folder / "step-00000002")
    shutil.rmtree(folder)
    checkpoint = newest(folder, mirror)
    assert checkpoint.folder == folder / "step-00000002"
    assert content(folder) == {f"step-00000002/{name}": data for name, data in before.items()}


def test_a_damaged_local_one_is_moved_aside_for_the_mirrors(both: tuple[Path, Mirror]) -> None:
    folder, mirror = both
    (folder / "step-00000002" / "manifest.json").write_text("garbage")
    assert newest(folder, mirror).manifest.step == 2
    assert sorted(p.name[:13] for p in folder.iterdir()) == ["damaged-step-", "step-00000001", "step-00000002"]


def test_a_copy_damaged_there_is_named_and_the_next_best_is_taken(both: tuple[Path, Mirror], tmp_path: Path) -> None:
    folder, mirror = both
    shutil.rmtree(folder / "step-00000002")
    (tmp_path / "m" / "step-00000002" / "config.yaml").write_text("seed: 8\n")
    found = newest_valid(folder, mirror=mirror)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 1
    assert "SHA-256" in found.damaged[0][1]
    assert names(folder) == ["step-00000001"], "nothing of the bad copy is left"


def test_one_checkpoint_further_back_is_found_in_the_mirror_too(both: tuple[Path, Mirror]) -> None:
    folder, mirror = both
    shutil.rmtree(folder / "step-00000001")
    assert newest(folder, mirror, before_step=2).manifest.step == 1
    assert newest_valid(folder, mirror=mirror, before_step=1).checkpoint is None
    assert newest_valid(folder, mirror=mirror, at_step=9).checkpoint is None


def test_a_mirror_that_cannot_be_asked_leaves_the_local_ones(
    both: tuple[Path, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mirror = both

    def refuse() -> list[int]:
        raise StorageError("no network")

    monkeypatch.setattr(mirror._place, "steps", refuse)
    assert newest(folder, mirror).manifest.step == 2


def test_a_copy_under_a_wrong_steps_name_is_refused(both: tuple[Path, Mirror], tmp_path: Path) -> None:
    folder, mirror = both
    (tmp_path / "m" / "step-00000002").rename(tmp_path / "m" / "step-00000007")
    with pytest.raises(CheckpointError, match="step 7 holds step 2"):
        mirror.fetch(7, folder)
    assert newest(folder, mirror).manifest.step == 2


# --- with the writer -------------------------------------------------------------------------------------------------


def writer_of(tmp_path: Path, **config: Any) -> CheckpointWriter:
    chosen = CheckpointConfig(every_steps=1, mirror=str(tmp_path / "m"), **config)
    return CheckpointWriter(tmp_path / "c", config=chosen, control=ControlPlane(World()))


def saved(writer: CheckpointWriter, step: int) -> None:
    writer.save(fragments_of(state_of(step)), manifest_of(step), config_yaml="", tokenizer=None)


def test_the_writer_offers_what_it_publishes_and_tells_of_it(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    saved(writer, 1)
    assert writer.wait_for_mirror(30)
    saved(writer, 2)
    assert writer.wait_for_mirror(30)
    writer.close()
    assert names(tmp_path / "m") == ["step-00000001", "step-00000002"]
    assert names(tmp_path / "c") == ["step-00000002"]
    told = [(e["event"], e["step"]) for e in writer.take_events()]
    assert told == [("mirrored", 1), ("checkpoints_removed", 2), ("mirrored", 2)]
    assert writer.take_events() == []


def test_what_is_being_copied_outlives_retention(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    place = Slow(tmp_path / "m")
    assert writer.mirror is not None
    writer.mirror._place = place
    saved(writer, 1)
    place.begun.wait()
    saved(writer, 2)
    saved(writer, 3)
    saved(writer, 4)
    assert names(tmp_path / "c") == ["step-00000001", "step-00000003", "step-00000004"], "1 is being read, 3 was next"
    place.let_go.set()
    assert writer.wait_for_mirror(30)
    assert names(tmp_path / "m") == ["step-00000001", "step-00000004"]


def test_after_a_rollback_neither_tier_offers_the_course_that_was_left(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, keep_last=3, mirror_keep_last=3)
    for step in (1, 2, 3):
        saved(writer, step)
        assert writer.wait_for_mirror(30)
    assert writer.roll_back(1) == [2, 3]
    assert writer.mirror is not None
    assert newest(tmp_path / "c", writer.mirror).manifest.step == 1


def test_a_rollback_to_a_checkpoint_that_is_not_there_takes_nothing_away(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    for step in (2, 3):
        saved(writer, step)
        assert writer.wait_for_mirror(30)
    with pytest.raises(CheckpointError, match="no checkpoint of step 1"):
        writer.roll_back(1)
    assert names(tmp_path / "c") == names(tmp_path / "m") == ["step-00000002", "step-00000003"]
