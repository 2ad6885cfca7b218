"""Progress from names, events and exit files; things moved in a run folder, nothing deleted."""

from __future__ import annotations

import json
from pathlib import Path

from dstrain.base.errors import ExitCode
from dstrain.base.world import World
from dstrain.health.outcomes import write_exit
from dstrain.launcher.run_files import Progress, progress_of, put_back, put_exits_away, set_newest_aside


def _checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_new_run_has_made_none(tmp_path: Path) -> None:
    assert progress_of(tmp_path / "new") == Progress(-1, 0, -1)


def test_progress_is_the_newest_checkpoint_and_the_highest_step_that_anything_speaks_of(tmp_path: Path) -> None:
    _checkpoints(tmp_path, 4, 8)
    assert progress_of(tmp_path) == Progress(8, 2, 8)
    events = [{"event": "step", "step": 9}, {"event": "saved", "step": 99}, {"event": "step", "step": 3}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "step", "st')
    assert progress_of(tmp_path).reached == 9
    write_exit(tmp_path, World(rank=1, size=2), code=ExitCode.DEFECT, cause="x", step=11)
    write_exit(tmp_path, World(rank=0, size=2), code=ExitCode.DEFECT, cause="x", step=None)
    assert progress_of(tmp_path) == Progress(8, 2, 11)


def test_only_the_end_of_long_events_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"event": "step", "step": step, "filler": "x" * 100}) + "\n" for step in range(20_000)]
    (tmp_path / "events.jsonl").write_text("".join(lines))
    assert progress_of(tmp_path).reached == 19_999


def test_exit_files_are_moved_into_the_logs_and_never_over_others(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    put_exits_away(tmp_path, before_attempt=1)  # nothing there
    for step in (1, 2):
        write_exit(tmp_path, World(), code=ExitCode.COMPLETE, cause="x", step=step)
        put_exits_away(tmp_path, before_attempt=3)
        assert not (tmp_path / "exit").exists()
    found = [
        tmp_path / "logs" / name / "rank-00000.json"
        for name in ("exit-before-attempt-0003", "exit-before-attempt-0003-2")
    ]
    assert [json.loads(path.read_text())["step"] for path in found] == [1, 2]


def test_a_checkpoint_set_aside_counts_no_longer_and_gets_its_name_back(tmp_path: Path) -> None:
    _checkpoints(tmp_path, 4, 8)
    aside, step = set_newest_aside(tmp_path)
    assert (aside.name, step) == ("set-aside-step-00000008", 8)
    assert progress_of(tmp_path) == Progress(4, 1, 4)
    assert put_back(tmp_path, aside, step)
    assert _names(tmp_path) == ["step-00000004", "step-00000008"]


def test_nothing_is_replaced_when_the_step_was_written_again(tmp_path: Path) -> None:
    _checkpoints(tmp_path, 4, 8)
    aside, step = set_newest_aside(tmp_path)
    _checkpoints(tmp_path, 8)
    assert not put_back(tmp_path, aside, step)
    assert set_newest_aside(tmp_path)[0].name == "set-aside-step-00000008-2"
    assert _names(tmp_path) == ["set-aside-step-00000008", "set-aside-step-00000008-2", "step-00000004"]
