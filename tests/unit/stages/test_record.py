"""What a run folder says about its data, also when parts of it are missing, torn or taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import ConfigError
from dstrain.stages.record import LedgerPoint, contradictions, read_record


def write_events(folder: Path, events: list[dict[str, Any]]) -> None:
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 0, **e}) + "\n" for e in events))


def step(number: int, total: int, *, of_step: int = 1) -> dict[str, Any]:
    return {"event": "step", "step": number, "ledger": str(total), "step_ledger": str(of_step), "rows": 4 * number}


def test_what_a_resume_took_back_does_not_count(tmp_path: Path) -> None:
    events = [
        {"event": "started", "step": 0, "world": 2}, step(1, 1), step(2, 2), {"event": "saved", "step": 2, "ledger": "2"},
        step(3, 77, of_step=75), {"event": "resumed", "step": 2, "world": 3}, step(3, 3),
        {"event": "ended", "step": 3, "ledger": "3", "rows": 12},
    ]  # fmt: skip
    write_events(tmp_path, events)
    record = read_record(tmp_path)
    assert [(p.step, p.total) for p in record.points] == [(1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]
    assert record.worlds == ((0, 2), (2, 3))
    assert record.last_step == 3
    assert record.newest is None
    assert contradictions(record.points) == []


def test_later_points_are_left_out_where_a_step_is_given(tmp_path: Path) -> None:
    write_events(tmp_path, [step(1, 1), step(2, 2), step(3, 3)])
    assert read_record(tmp_path, until=2).last_step == 2


def test_closed_blocks_and_torn_lines_are_read(tmp_path: Path) -> None:
    write_events(
        tmp_path, [step(1, 1), {"event": "damaged_block", "step": 1, "source": "a", "block": 5, "from_step": 3}]
    )
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    record = read_record(tmp_path)
    assert record.closed == (("a", 5, 0),)
    assert len(record.points) == 1


def test_a_folder_without_any_trace_has_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor a logged step"):
        read_record(tmp_path)


def test_a_checkpoint_that_is_not_whole_is_named_and_left_out(tmp_path: Path) -> None:
    write_events(tmp_path, [step(1, 1)])
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000001/manifest.json").write_text("{}")
    record = read_record(tmp_path)
    assert record.newest is None
    assert "step-00000001" in record.damaged[0]


def point(number: int, *, total: int | None = None, of_step: int | None = None, where: str = "x") -> LedgerPoint:
    return LedgerPoint(step=number, where=where, of_step=of_step, total=total)


@pytest.mark.parametrize(
    ("points", "named"),
    [
        ([point(1, total=5, of_step=5), point(2, total=9, of_step=4)], None),
        ([point(1, total=2**63 - 1), point(2, total=1, of_step=2)], None),
        ([point(10, total=5, of_step=5), point(20, total=9, of_step=1)], None),
        ([point(1, total=5, of_step=5), point(2, total=9, of_step=3)], "step 2"),
        ([point(4, total=5), point(4, total=6, where="checkpoint")], "checkpoint"),
        ([point(4, total=5, where="event"), point(4, total=5), point(5, total=8, of_step=4)], "step 5"),
    ],
)
def test_records_that_contradict_each_other_are_named(points: list[LedgerPoint], named: str | None) -> None:
    problems = contradictions(points)
    assert bool(problems) == (named is not None)
    assert named is None or named in problems[0]
