"""What stays: the newest k that can be read, the protected, and everything damaged."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dstrain.checkpoint.reader import newest_valid
from dstrain.checkpoint.retention import keep_newest, steps_to_delete
from tests.support.tiny_checkpoints import save

steps_of_a_run = st.lists(st.integers(0, 1000), unique=True, max_size=20)


@given(steps=steps_of_a_run, keep_last=st.integers(1, 8), protect=st.frozensets(st.integers(0, 1000), max_size=4))
def test_the_newest_and_the_protected_stay_and_all_else_goes(
    steps: list[int], keep_last: int, protect: frozenset[int]
) -> None:
    doomed = steps_to_delete(steps, keep_last=keep_last, protect=protect)
    kept = set(steps) - set(doomed)
    assert doomed == sorted(doomed)
    assert set(doomed) <= set(steps)
    assert not protect & set(doomed)
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert len(kept) <= keep_last + len(protect & set(steps))


@given(steps=steps_of_a_run, keep_last=st.integers(1, 8))
def test_a_second_pass_deletes_nothing_more(steps: list[int], keep_last: int) -> None:
    left = [s for s in steps if s not in steps_to_delete(steps, keep_last=keep_last, protect=frozenset())]
    assert steps_to_delete(left, keep_last=keep_last, protect=frozenset()) == []


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_saving_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep_last=2, protect=frozenset({2}))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_damaged_checkpoints_are_kept_and_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    (tmp_path / "step-00000004" / "manifest.json").write_text("garbage")
    assert keep_newest(tmp_path, keep_last=1) == [1]
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    found = newest_valid(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 2


def test_one_checkpoint_is_always_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert keep_newest(tmp_path, keep_last=1) == []
    assert keep_newest(tmp_path / "absent", keep_last=1) == []
    assert names(tmp_path) == ["step-00000001"]
