"""The diary of a supervised run: whole at every moment, readable by tools, and the failures counted for the save interval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import DataError
from dstrain.launcher.history import AttemptRecord, History, failure_statistics, read_history


def _record(number: int, **fields: Any) -> AttemptRecord:
    given = {
        "number": number, "stage": "pretrain", "mark": f"t{number}", "argv": ("x", "y"), "processes": 2, "hosts": ("a",),
        "log": f"logs/{number}.log", "started": 1000.0 * number, "checkpoint_before": -1, "reached_before": -1,
    }  # fmt: skip
    return AttemptRecord(**{**given, **fields})


def _history(folder: Path) -> History:
    return History(folder, say=lambda text: None)


def test_what_was_written_is_read_back_and_numbers_go_on(tmp_path: Path) -> None:
    history = _history(tmp_path)
    assert history.next_number == 1
    history.begin(_record(1))
    assert read_history(tmp_path)[0].ended is None  # visible while it runs
    closed = history.close(code=76, cause="disk", ranks_at_fault=(1,), checkpoint_after=8, reached_after=9)
    assert read_history(tmp_path) == (closed,)
    again = _history(tmp_path)
    assert again.next_number == 2
    assert again.attempts == [closed]


def test_no_secret_of_an_argument_is_kept(tmp_path: Path) -> None:
    history = _history(tmp_path)
    history.begin(_record(1, argv=("pretrain", "data.path=https://me:s3cretpass@host/shards")))
    history.close(code=78, cause="https://me:s3cretpass@host/shards: not found")
    assert "s3cretpass" not in (tmp_path / "supervisor.json").read_text()


def test_an_attempt_whose_supervisor_was_killed_is_closed_by_its_log(tmp_path: Path) -> None:
    _history(tmp_path).begin(_record(1))
    log = tmp_path / "logs/1.log"
    log.parent.mkdir()
    log.touch()
    os.utime(log, (4600.0, 4600.0))
    [record] = _history(tmp_path).attempts
    assert (record.ended, record.cause) == (4600.0, "the supervisor was killed")


@pytest.mark.parametrize("text", ["{torn", "[]", '{"format": 2}', '{"format": 1, "attempts": [{"number": "x"}]}'])
def test_a_damaged_file_is_named_and_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "supervisor.json").write_text(text)
    with pytest.raises(DataError, match=r"supervisor\.json"):
        read_history(tmp_path)
    said: list[str] = []
    assert History(tmp_path, say=said.append).attempts == []
    assert "begins anew" in said[0]


def test_failures_are_counted_where_machines_fail_and_not_where_people_stop(tmp_path: Path) -> None:
    assert failure_statistics(tmp_path).mean_hours_between is None
    history = _history(tmp_path)
    for number, code in enumerate([0, 75, 78, 1, 76, 77, 79, None], start=1):
        history.attempts.append(_record(number, ended=1000.0 * number + 1800, code=code))
    history.begin(_record(9, stage="evaluate", ended=99_000.0, code=1))
    found = failure_statistics(tmp_path)
    assert (found.failures, found.hours, found.mean_hours_between) == (5, 4.0, 0.8)
