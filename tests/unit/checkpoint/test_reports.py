"""Rank 0 believes only reports of this save, notices a failure at once, and gives a rank without room one more try."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import StorageError
from dstrain.checkpoint.layout import leftovers, reports_folder, staging_folder
from dstrain.checkpoint.rank_file import Part
from dstrain.checkpoint.reports import Collector, asked_again, part_of, read_report, write_report

PART = Part("rank-00001-of-00003.safetensors", 64, "0" * 64, (("w", "fp32", 0, 6),), True)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    staging = staging_folder(tmp_path, 5, "ab")
    staging.mkdir()
    reports_folder(staging).mkdir()
    return staging


def no_room() -> bool:
    return False


def test_a_report_is_read_back_as_it_was_written(staging: Path) -> None:
    write_report(staging, "ab", 1, 1, PART)
    report = read_report(staging, "ab", 1, 1)
    assert report is not None
    assert part_of(report) == PART
    assert list(staging.iterdir()) == [], "nothing that could be published"
    assert reports_folder(staging) in leftovers(staging.parent), "removed with what killed jobs leave"


def test_reports_of_another_save_another_try_and_half_reports_are_not_there(staging: Path) -> None:
    write_report(staging, "other", 1, 1, PART)
    assert read_report(staging, "ab", 1, 1) is None
    write_report(staging, "ab", 1, 2, PART)
    assert read_report(staging, "ab", 1, 1) is None
    next(reports_folder(staging).glob("rank-00001-1.json")).write_text('{"nonce": "ab"')
    assert read_report(staging, "ab", 1, 1) is None


def test_all_are_waited_for_and_each_counts_once(staging: Path) -> None:
    collector = Collector(staging, "ab", 3)
    collector.look(no_room)
    assert set(collector.missing) == {1, 2}
    write_report(staging, "ab", 2, 1, PART)
    collector.look(no_room)
    assert set(collector.missing) == {1}
    write_report(staging, "ab", 1, 1, PART)
    collector.look(no_room)
    assert not collector.missing
    assert set(collector.parts) == {1, 2}


def test_a_failure_is_told_at_once_though_others_have_not_reported(staging: Path) -> None:
    collector = Collector(staging, "ab", 4)
    write_report(staging, "ab", 2, 1, None, error="disk on fire")
    with pytest.raises(StorageError, match="rank 2: disk on fire"):
        collector.look(no_room)


def test_a_rank_without_room_is_asked_again_once_if_room_was_made(staging: Path) -> None:
    collector = Collector(staging, "ab", 2)
    write_report(staging, "ab", 1, 1, None, error="full", full=True)
    assert not asked_again(staging, "ab")
    collector.look(lambda: True)
    assert asked_again(staging, "ab")
    assert not asked_again(staging, "other")
    collector.look(no_room)
    assert collector.missing == {1: 2}
    write_report(staging, "ab", 1, 2, None, error="still full", full=True)
    with pytest.raises(StorageError, match="rank 1: still full"):
        collector.look(lambda: True)


def test_several_ranks_without_room_share_the_room_that_was_made(staging: Path) -> None:
    collector = Collector(staging, "ab", 3)
    made: list[int] = []

    def make_room() -> bool:
        made.append(1)
        return True

    for rank in (1, 2):
        write_report(staging, "ab", rank, 1, None, error="full", full=True)
    collector.look(make_room)
    assert len(made) == 1
    assert collector.missing == {1: 2, 2: 2}


def test_where_no_room_can_be_made_the_save_fails_at_once(staging: Path) -> None:
    collector = Collector(staging, "ab", 2)
    write_report(staging, "ab", 1, 1, None, error="full", full=True)
    with pytest.raises(StorageError, match="rank 1: full"):
        collector.look(no_room)
    assert not asked_again(staging, "ab")
