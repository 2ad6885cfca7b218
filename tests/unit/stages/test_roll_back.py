"""Where a run goes back to, what it notes, and what a restart makes of the note."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dstrain.base.errors import CheckpointError, NoProgressError
from dstrain.health.guards import RollBack
from dstrain.stages import roll_back
from dstrain.stages.roll_back import FILE_NAME, Window, go_back, read_windows, windows_missing


class Writer:
    """Knows steps of checkpoints only."""

    def __init__(self, *steps: int, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.mirror, self.steps, self.newer_than = Path("checkpoints"), None, list(steps), []

        def newest(folder, *, before_step, mirror=None):
            step = max((s for s in self.steps if s < before_step), default=None)
            found = None if step is None else SimpleNamespace(manifest=SimpleNamespace(step=step))
            return SimpleNamespace(checkpoint=found)

        monkeypatch.setattr(roll_back, "newest_valid", newest)

    def roll_back(self, step: int) -> None:
        self.newer_than.append(step)


WANTED = RollBack(onset=200, before=100, first=150, last=260)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((50, 100, 150, 200), Window(100, 150, 260, "why")),
        ((100, 200, 250), Window(100, 150, 260, "why")),
        ((170, 200, 210), Window(200, 200, 260, "why")),  # none old enough: the newest from before the trouble
        ((0, 300), Window(0, 150, 260, "why")),
    ],
)
def test_the_newest_state_that_is_old_enough_is_taken_and_newer_ones_lose_their_name(
    tmp_path, monkeypatch, steps, expected
):
    writer = Writer(*steps, monkeypatch=monkeypatch)
    assert go_back(tmp_path, writer, WANTED, reason="why") == expected
    assert writer.newer_than == [expected.step]
    assert read_windows(tmp_path) == [expected]


def test_nothing_is_noted_when_there_is_nothing_to_go_back_to(tmp_path, monkeypatch):
    writer = Writer(201, 220, monkeypatch=monkeypatch)
    with pytest.raises(NoProgressError, match="no checkpoint from before step 200"):
        go_back(tmp_path, writer, WANTED, reason="why")
    assert (read_windows(tmp_path), writer.newer_than) == ([], [])


def test_newer_checkpoints_go_before_the_note_so_that_a_crash_in_between_cannot_resume_from_them(tmp_path, monkeypatch):
    writer = Writer(100, 200, monkeypatch=monkeypatch)

    def fails(step):
        assert not (tmp_path / FILE_NAME).exists()
        raise CheckpointError("disk")

    writer.roll_back = fails
    with pytest.raises(CheckpointError):
        go_back(tmp_path, writer, WANTED, reason="why")
    assert read_windows(tmp_path) == []


def test_a_checkpoint_knows_the_windows_that_were_decided_before_it_was_written():
    first, second = Window(100, 150, 260, "a"), Window(300, 310, 400, "b")
    assert windows_missing([first, second], step=50) == [first, second]
    assert windows_missing([first, second], step=100) == [first, second]
    assert windows_missing([first, second], step=101) == [second]
    assert windows_missing([first, second], step=301) == []


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "[1]", '[{"step": 1}]', '[{"step": 1, "first": "x", "last": 2, "reason": ""}]']
)
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="not a record of roll-backs"):
        read_windows(tmp_path)
