"""The loop in this process: what it says and writes down, and evaluation left alone."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from dstrain.base.errors import ExitCode
from dstrain.launcher.history import read_history
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.starters import Command, Layout
from dstrain.launcher.supervisor import Job, Supervisor
from tests.support.fake_stage import make_supervisor


def _plan(folder: Path, **plan: Any) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def test_every_decision_is_said_and_written_down(tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    plan = _plan(tmp_path, ranks=1, steps=6, faults=[{"attempt": 1, "rank": 0, "step": 5, "do": 76}])
    code = make_supervisor(run, plan, starter="python", say=said.append).run()
    assert code is ExitCode.COMPLETE, said
    first, second = read_history(run)
    assert said[0] == "attempt 1: python, 1 ranks, from the beginning"
    assert said[1] == first.decision
    assert said[1].startswith("restart 1 of 6 in 0.0 s: planned at step 5")
    assert said[2] == "attempt 2: python, 1 ranks, from step 4"
    assert said[3] == second.decision == "stop with 0 (complete): complete"
    assert (first.code, first.reached_after, second.checkpoint_before) == (76, 5, 4)
    assert first.mark != second.mark


def test_an_evaluation_touches_neither_exit_files_nor_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "exit").mkdir()
    (tmp_path / "exit" / "rank-00000.json").write_text("{}")
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    job = Job("evaluate", tmp_path, ("evaluate", str(tmp_path)), Layout("python", 1))
    said: list[str] = []
    supervisor = Supervisor(
        job, RestartPolicy(first_wait_s=0.0), say=said.append, out=io.BytesIO(), environment=os.environ,
        build=lambda *_, **__: Command((sys.executable, "-c", "raise SystemExit(1)"), {}, ()),
    )  # fmt: skip
    assert supervisor.run() is ExitCode.NO_PROGRESS
    assert len(read_history(tmp_path)) == 3
    assert (tmp_path / "exit" / "rank-00000.json").exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]


def test_a_chosen_port_is_kept_and_a_free_one_is_taken_else(tmp_path: Path) -> None:
    ports: list[int] = []

    def build(*_: Any, port: int, **__: Any) -> Command:
        ports.append(port)
        return Command((sys.executable, "-c", "raise SystemExit(78)"), {}, ())

    for port in (29777, None):
        job = Job("evaluate", tmp_path, ("evaluate", "x"), Layout("python", 1), port=port)
        assert (
            Supervisor(job, RestartPolicy(), say=lambda _: None, out=io.BytesIO(), build=build).run()
            is ExitCode.BAD_INPUT
        )
    assert ports[0] == 29777
    assert 1024 <= ports[1] != 29777
