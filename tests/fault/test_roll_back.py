"""A lasting spike whose cause lies in the data: back to an older checkpoint, the data stepped over, and a run that audits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli.training import load_stage_config
from dstrain.stages.audit import audit_run
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config
from tests.support.spike_worker import BAD_STEPS
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

MAX_STEPS = 32
GUARDS = {
    "history_steps": 16, "least_history": 8, "sustained_steps": 2, "back_steps": 2, "skip_before": 1, "skip_after": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows than the run trains on: a spike's rows come once."""
    return build_tiny_shards(tmp_path_factory.mktemp("spike"), num_documents=1200)


def spiky_run(
    zygote: Zygote, shards: Path, run: Path, *, world_size: int, **guards: Any
) -> tuple[list[int], str, Path]:
    settings = pretrain_settings(
        shards, run, train={"max_steps": MAX_STEPS, "evaluate_rows": 4, "guards": {**GUARDS, **guards}}
    )
    config = write_config(run.with_suffix(".yaml"), settings)
    logs = run.parent / f"logs-{run.name}"
    with zygote.start_module("tests.support.spike_worker", str(config), world_size=world_size, log_folder=logs) as job:
        return job.wait(), job.output(), config


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory, shards: Path, zygote: Zygote) -> dict[int, Path]:
    """A run that met the spike, at two world sizes."""
    folder = tmp_path_factory.mktemp("rolled")
    for world in (1, 2):
        codes, said, _ = spiky_run(zygote, shards, folder / f"w{world}", world_size=world)
        assert codes == [0] * world, said
    return {world: folder / f"w{world}" for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
def test_the_run_goes_back_before_the_spike_once_and_completes(rolled: dict[int, Path], world: int) -> None:
    guard = events(rolled[world], "guard")
    assert [(e["step"], e["action"]) for e in guard] == [(21, "go_on"), (22, "roll_back")]
    assert guard[-1]["roll_back"] == {"onset": 20, "before": 18, "first": 19, "last": 24}
    [back] = events(rolled[world], "rolled_back")
    assert (back["step"], back["stepped_over"]) == (16, [19, 24])
    assert "deviations above the usual" in back["reason"]
    assert max(step_events(rolled[world])) == MAX_STEPS


@pytest.mark.parametrize("world", [1, 2])
def test_the_events_name_the_rows_that_were_at_fault(rolled: dict[int, Path], world: int) -> None:
    guard = events(rolled[world], "guard")
    assert all(len(event["rows"]) == 12 for event in guard)
    assert guard[0]["rows"] != guard[1]["rows"]


def test_after_it_the_rows_at_fault_do_not_come_back(rolled: dict[int, Path]) -> None:
    losses = [event["loss"] for event in step_events(rolled[1]).values()]
    assert (len(losses), max(losses) < 10) == (MAX_STEPS, True)
    high = [event["loss"] for event in events(rolled[1], "step") if event["loss"] > 10]
    assert len(high) == 2, "only the two steps of the spike itself, which the run took back"
    assert len(BAD_STEPS) > len(high)


def test_any_world_size_goes_back_alike_and_sees_the_same_data(rolled: dict[int, Path]) -> None:
    one, two = (step_events(rolled[world]) for world in (1, 2))
    assert sorted(one) == sorted(two) == list(range(1, MAX_STEPS + 1))
    for step, event in one.items():
        assert two[step]["step_ledger"] == event["step_ledger"], step
        assert two[step]["loss"] == pytest.approx(event["loss"], abs=1e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_the_run_audits_in_full(rolled: dict[int, Path], world: int) -> None:
    config = load_stage_config("pretrain", rolled[world].with_suffix(".yaml"), [])
    report = audit_run(config, full=True, quiet=True)  # type: ignore[arg-type]
    assert report.problems == ()
    assert report.steps == MAX_STEPS
    assert sum(epoch.left_out for epoch in report.coverage) > 0
    assert sum(epoch.repeated for epoch in report.coverage) == 0


def test_a_spike_that_roll_backs_may_not_cure_stops_the_run_with_a_diagnosis(
    shards: Path, tmp_path: Path, zygote: Zygote
) -> None:
    codes, said, _ = spiky_run(zygote, shards, tmp_path / "run", world_size=2, roll_backs_limit=0)
    assert codes == [79, 79]
    assert "deviations above the usual" in said
    assert "Traceback" not in said
