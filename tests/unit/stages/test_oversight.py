"""What stands around a run: phases for the watchdog, budgets of tokens, the past for the save interval."""

from __future__ import annotations

import json
from types import SimpleNamespace

from dstrain.base.protocols import RunState
from dstrain.base.world import World
from dstrain.health.heartbeat import Heartbeat
from dstrain.health.signals import StopRequest
from dstrain.health.stop_config import StopConfig
from dstrain.monitor.goodput_meter import GoodputMeter
from dstrain.stages.oversight import Oversight, limits_watched


def oversight(folder, **limits):
    told = []
    heartbeat = SimpleNamespace(enter=lambda phase, step: told.append((phase, step)))
    stop = StopRequest()
    found = Oversight(stop, SimpleNamespace(epoch=1), heartbeat, GoodputMeter(folder), StopConfig(**limits), folder)
    return found, stop, told


def test_the_first_step_of_a_process_is_told_apart(tmp_path):
    found, _, told = oversight(tmp_path)
    for step in range(7, 12):
        found.enter("step", step)
        found.on_step(RunState(step=step + 1), None)
    found.enter("evaluate", 12)
    assert told == [("first_step", 7), *[("step", s) for s in (8, 9, 10, 11)], ("evaluate", 12)]
    assert found.where() == "in phase evaluate of step 12"


def test_every_phase_that_a_run_names_is_one_the_heartbeat_knows():
    heartbeat = Heartbeat(on_check=lambda: None)
    for phase in ("rendezvous", "start_up", "restore", "data", "first_step", "step", "evaluate", "save", "finish"):
        heartbeat.enter(phase, 0)
    heartbeat.close()


def test_a_spent_budget_of_tokens_ends_the_run_for_good(tmp_path):
    found, stop, _ = oversight(tmp_path, max_tokens=1000)
    found.on_step(RunState(tokens=999), None)
    assert stop.reason is None
    found.on_step(RunState(tokens=1000), None)
    assert "max_tokens" in stop.reason
    assert stop.requeue is False


def test_a_spent_budget_of_hours_in_steps_ends_the_run_for_good(tmp_path):
    found, stop, _ = oversight(tmp_path, max_training_hours=1.0)
    found.on_step(RunState(compute_seconds=3599.0), None)
    assert stop.reason is None
    found.on_step(RunState(compute_seconds=3600.0), None)
    assert "max_training_hours" in stop.reason
    assert stop.requeue is False


def test_attempts_that_left_without_a_word_or_by_a_fault_count_as_failures(tmp_path):
    for outcome in ("saved", None, "failed"):
        meter = GoodputMeter(tmp_path)
        meter.start()
        if outcome:
            meter.end(outcome)
    found, _, _ = oversight(tmp_path)
    found.goodput.start()
    past = found.past()
    assert past.failures == 2
    assert past.hours > 0
    assert len(list((tmp_path / "attempts").glob("*.json"))) == 4
    assert json.loads((tmp_path / "attempts" / "0003.json").read_text())["outcome"] == "failed"


def test_only_rank_0_looks_for_the_stop_file(tmp_path):
    (tmp_path / "stop").write_text("maintenance")
    for rank in (1, 0):
        found, stop, _ = oversight(tmp_path)
        config = SimpleNamespace(stop=StopConfig(look_every_s=0.01), run_folder=tmp_path)
        with limits_watched(found, config, World(rank=rank, size=2)):
            while rank == 0 and stop.reason is None:
                pass
        assert stop.reason == ("stop file: maintenance" if rank == 0 else None)
