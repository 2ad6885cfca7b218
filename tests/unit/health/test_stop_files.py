import os

import pytest

from dstrain.health.stop_files import stop_file_reason, take_save_file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "stop file"),
        (b"loss looks wrong\n", "stop file: loss looks wrong"),
        (b"two\nlines\t\x1b[31m and \xff\x00", "stop file: two lines [31m and \ufffd"),
        (b"x" * 10_000, "stop file: " + "x" * 200),
    ],
)
def test_the_kill_switch_says_why_and_stays(tmp_path, content, reason):
    assert stop_file_reason(tmp_path) is None
    (tmp_path / "stop").write_bytes(content)
    assert stop_file_reason(tmp_path) == reason
    assert stop_file_reason(tmp_path) == reason


def test_a_kill_switch_need_not_be_a_readable_file(tmp_path):
    (tmp_path / "stop").mkdir()
    assert stop_file_reason(tmp_path) == "stop file"


def test_the_save_switch_works_once(tmp_path):
    assert not take_save_file(tmp_path)
    (tmp_path / "save").touch()
    assert take_save_file(tmp_path)
    assert not take_save_file(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_save_switch_that_cannot_be_taken_away_is_not_obeyed_for_ever(tmp_path):
    (tmp_path / "save").mkdir()
    assert not take_save_file(tmp_path)
