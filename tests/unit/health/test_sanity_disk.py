import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.sanity_disk import Room, bytes_of_a_save, judge_room, judge_scratch, room_at

BYTES = st.integers(0, 1 << 45)


@given(BYTES, st.integers(1, 1 << 40), st.integers(1, 5))
def test_a_save_that_cannot_fit_is_refused_and_one_that_only_just_fits_is_said(free, needed, keep):
    (finding,) = judge_room({"run_folder": Room("/r", free, -1)}, needed_bytes=needed, keep=keep)
    expected = "failed" if free < needed else "warning" if free < (keep + 1) * needed else "ok"
    assert finding.level == expected
    if expected == "failed":
        assert finding.code == 76
        assert "/r" in finding.line()


def test_a_disk_without_inodes_is_full_too():
    (finding,) = judge_room({"run_folder": Room("/r", 1 << 40, 3)}, needed_bytes=1, keep=2)
    assert (finding.level, finding.text) == ("failed", "run_folder has 3 files left on its disk (/r)")


def test_a_place_that_cannot_be_asked_is_not_called_well():
    (finding,) = judge_room({"checkpoint.mirror": None}, needed_bytes=1, keep=2)
    assert finding.level == "skipped"


def test_hosts_whose_scratch_is_small_are_named():
    rooms = [Room("/tmp", 1 << 40, -1), None, Room("/tmp", 5_000_000, -1)]
    (finding,) = judge_scratch(rooms, ["a", "a", "b"], name="the temporary folder", needed_bytes=1 << 28)
    assert (finding.level, finding.ranks, finding.hosts) == ("warning", (2,), ("b",))
    assert "5 MB free" in finding.text
    assert judge_scratch(rooms[:2], ["a", "a"], name="x", needed_bytes=1 << 28) == []


def test_the_room_of_a_folder_that_does_not_exist_yet_is_its_parents(tmp_path):
    assert room_at(tmp_path / "a/b/c").free_bytes == pytest.approx(room_at(tmp_path).free_bytes, rel=0.05)


def test_a_save_holds_fp32_weights_and_two_moments():
    assert bytes_of_a_save(110_000_000) == pytest.approx(12 * 110e6, rel=0.01)
