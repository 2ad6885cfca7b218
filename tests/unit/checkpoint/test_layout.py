"""Names on disk, and the names a manifest may not use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.checkpoint.layout import (
    checkpoints_folder,
    fragment_file,
    is_fragment_file,
    is_safe_name,
    leftovers,
    published_steps,
    reports_folder,
    staging_folder,
    step_folder,
    superseded,
)


def test_steps_are_listed_newest_first_by_number_not_by_text_or_clock(tmp_path: Path) -> None:
    for step in (100_000_000, 7, 99_999_999, 4000):
        step_folder(tmp_path, step).mkdir()
    assert [step for step, _ in published_steps(tmp_path)] == [100_000_000, 99_999_999, 4000, 7]
    assert published_steps(tmp_path)[-1][1].name == "step-00000007"


@pytest.mark.parametrize(
    "name",
    ["step-1", "step-0000000x", ".staging-00000001-abc", "damaged-step-00000001-ab", "step-00000001.bak", "latest"],
)
def test_other_folders_are_not_checkpoints(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert published_steps(tmp_path) == []


def test_a_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert published_steps(tmp_path / "absent") == []
    assert leftovers(tmp_path / "absent") == []
    assert checkpoints_folder(tmp_path) == tmp_path / "checkpoints"


def test_leftovers_are_staging_and_half_deleted_folders_only(tmp_path: Path) -> None:
    for name in ("step-00000001", "damaged-step-00000002-ab", ".deleting-step-00000003-ab", "notes"):
        (tmp_path / name).mkdir()
    staging_folder(tmp_path, 5, "ab").mkdir()
    assert [p.name for p in leftovers(tmp_path)] == [".deleting-step-00000003-ab", ".staging-00000005-ab"]


def test_reports_lie_beside_the_staging_folder_and_go_with_the_leftovers(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 5, "ab")
    reports_folder(staging).mkdir()
    assert reports_folder(staging).parent == staging.parent
    assert leftovers(tmp_path) == [reports_folder(staging)]
    assert published_steps(tmp_path) == []


def test_superseded_folders_are_told_with_their_step(tmp_path: Path) -> None:
    for name in ("superseded-step-00000012-ab12", "superseded-notes", "step-00000001", "damaged-step-00000002-ab"):
        (tmp_path / name).mkdir()
    assert superseded(tmp_path) == [(12, tmp_path / "superseded-step-00000012-ab12")]
    assert superseded(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "name",
    [
        "..", "../x", "tokenizer/../x", "tokenizer/..", "/etc/passwd", "tokenizer//etc", "a/b", "tokenizer/a/b", "", ".", ".hidden",
        "a\\b", "C:x", "a\n", "a\0b", "-rf", "tokenizer/", "tokenizer/.x", "~", "a b", "é",
    ],
)  # fmt: skip
def test_hostile_names_are_refused(name: str) -> None:
    assert not is_safe_name(name)


@given(st.text(max_size=20))
def test_a_name_that_passes_stays_inside_the_folder(name: str) -> None:
    if is_safe_name(name):
        root = Path("/checkpoint")
        path = Path("/checkpoint") / name
        assert path.parent in (root, root / "tokenizer")
        assert ".." not in path.parts


def test_names_that_are_written_are_safe() -> None:
    for name in (fragment_file(0, 1), fragment_file(99_999, 99_999), "config.yaml", "tokenizer/tokenizer_config.json"):
        assert is_safe_name(name)
    assert fragment_file(3, 8) == "rank-00003-of-00008.safetensors"
    assert is_fragment_file(fragment_file(3, 8))
    assert not is_fragment_file("rank-3-of-8.safetensors")
    assert not is_fragment_file("rank-00003-of-00008.safetensors.bak")
