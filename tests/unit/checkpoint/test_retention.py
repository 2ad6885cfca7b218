"""What stays: the newest k that count, milestones, the protected, the newest verified one, and everything damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import StorageError
from dstrain.checkpoint import retention
from dstrain.checkpoint.manifest import sealed
from dstrain.checkpoint.reader import newest_valid
from dstrain.checkpoint.retention import Kept, Retention, set_aside_newer, steps_to_delete
from tests.support.tiny_checkpoints import content, save

steps_of_a_run = st.lists(st.integers(0, 1000), unique=True, max_size=20)
some_steps = st.frozensets(st.integers(0, 1000), max_size=6)


@given(steps=steps_of_a_run, last=st.integers(1, 8), every=st.none() | st.integers(1, 400), protect=some_steps, verified=some_steps,
       coming=st.integers(0, 1))  # fmt: skip
def test_the_newest_the_milestones_the_protected_and_the_last_verified_stay_and_all_else_goes(
    steps: list[int], last: int, every: int | None, protect: frozenset[int], verified: frozenset[int], coming: int
) -> None:
    doomed = steps_to_delete(steps, kept=Kept(last, every), protect=protect, verified=verified, coming=coming)
    kept = set(steps) - set(doomed)
    assert doomed == sorted(doomed)
    assert set(doomed) <= set(steps)
    assert not protect & set(doomed)
    milestones = {s for s in steps if every is not None and s and s % every == 0}
    assert milestones <= kept
    newest = max(1, last - coming)
    assert set(sorted(steps)[-newest:]) <= kept
    known = verified & set(steps)
    assert not known or max(known) in kept
    assert len(kept) <= newest + len(protect & set(steps)) + len(milestones) + 1


@given(steps=steps_of_a_run, last=st.integers(1, 8), verified=some_steps)
def test_a_second_pass_deletes_nothing_more(steps: list[int], last: int, verified: frozenset[int]) -> None:
    left = [s for s in steps if s not in steps_to_delete(steps, kept=Kept(last), verified=verified)]
    assert steps_to_delete(left, kept=Kept(last), verified=verified) == []


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def rule(folder: Path, *, last: int = 1, every: int | None = None) -> Retention:
    return Retention(folder, kept=Kept(last, every))


def unverified(folder: Path) -> None:
    """As a writer without verify_after_write leaves it."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "read_back": False})))


def test_saving_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep_last=2, protect=frozenset({2}))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_milestones_stay_for_good(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    assert rule(tmp_path, every=2).apply() == [1, 3]


def test_damaged_checkpoints_are_kept_and_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    (tmp_path / "step-00000004" / "manifest.json").write_text("garbage")
    torn = tmp_path / "step-00000005" / "rank-00000-of-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert rule(tmp_path).apply() == [1]
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]
    found = newest_valid(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 2


def test_the_last_verified_one_outlives_newer_ones_that_nobody_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):
        unverified(tmp_path / f"step-0000000{step}")
    assert rule(tmp_path).apply() == [1, 3]
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_step_that_a_start_has_verified_counts_as_verified(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        unverified(tmp_path / f"step-0000000{step}")
    chosen = rule(tmp_path)
    chosen.note_verified(1)
    assert chosen.apply() == [2]


def test_making_room_goes_one_further_but_never_to_the_last_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert rule(tmp_path, last=3).apply() == []
    assert rule(tmp_path, last=3).make_room(4) == [1]
    assert rule(tmp_path, last=1).make_room(4) == [2]
    assert rule(tmp_path, last=1).make_room(4) == []
    assert names(tmp_path) == ["step-00000003"]


def test_one_checkpoint_is_always_left(tmp_path: Path) -> None:
    unverified(save(tmp_path, 1))  # else it would stay as the last one that was read back
    assert rule(tmp_path).apply() == []
    assert rule(tmp_path).make_room(2) == []
    assert rule(tmp_path / "absent").apply() == []
    assert names(tmp_path) == ["step-00000001"]


def test_a_rollback_takes_the_name_from_newer_ones_and_the_next_save_removes_them(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    before = content(tmp_path / "step-00000003")
    assert set_aside_newer(tmp_path, 1) == [3, 2]
    found = newest_valid(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 1
    aside = [p for p in tmp_path.iterdir() if p.name.startswith("superseded-step-00000003-")]
    assert [content(p) for p in aside] == [before]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_cannot_be_removed_is_not_called_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)

    def refuse(path: Path) -> None:
        raise StorageError(f"{path}: cannot be written")

    monkeypatch.setattr(retention, "remove_directory", refuse)
    assert rule(tmp_path).apply() == []
    assert len(names(tmp_path)) == 3
