"""When a save is due, when it is not begun, and what its end means, with a writer that ends as told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ExitCode, RunInUseError
from dstrain.base.protocols import RunState
from dstrain.base.world import World
from dstrain.checkpoint.outcome import Published, SaveOutcome
from dstrain.checkpoint.writer import CheckpointConfig
from dstrain.health.signals import StopRequest
from dstrain.stages.saving import Contents, Past, Saving
from tests.support.tiny_checkpoints import fragments_of, manifest_of, state_of


def saving(tmp_path: Path, **config):
    events: list[tuple[str, dict]] = []
    monitor = SimpleNamespace(
        event=lambda name, **fields: events.append((name, fields)),
        saved=lambda state, **fields: events.append(("saved", {"state": state, **fields})),
    )
    stop, state = StopRequest(), RunState(step=3, ledger=11)
    found = Saving(
        CheckpointConfig(**config), run_folder=tmp_path, control=ControlPlane(World()), lease=SimpleNamespace(check=lambda: None),
        stop=stop,
    )  # fmt: skip
    contents = Contents(
        fragments=lambda: fragments_of(state_of(3)), manifest=manifest_of, config_yaml="seed: 0\n", tokenizer=None
    )
    found.open(contents, state=lambda: state, monitor=monitor, past=Past(0, 0.0))
    return found, stop, state, events


def test_a_save_is_told_with_the_counters_of_its_own_step_although_training_went_on(tmp_path):
    found, _, state, events = saving(tmp_path)
    found.start(3)
    state.step, state.ledger = 9, 99
    assert found.settle() is True
    ((_, fields),) = [event for event in events if event[0] == "saved"]
    assert (fields["state"].step, fields["state"].ledger, fields["folder"]) == (3, 11, "step-00000003")
    assert found.is_saved(3)
    assert not found.is_saved(9)
    assert found.last_saved_step == 3


def test_a_save_that_cannot_finish_before_the_kill_is_not_begun(tmp_path):
    found, stop, _, events = saving(tmp_path)
    found.start(3)
    found.settle()
    stop.can_save = lambda seconds: False
    found.start(4)
    assert found.settle() is True
    assert events[-1][0] == "save_not_begun"
    assert not found.is_saved(4)


def test_a_failed_save_is_an_event_and_another_owner_ends_the_run(tmp_path):
    found, _, _, events = saving(tmp_path)
    outcomes = [
        SaveOutcome(3, error="the disk is full"),
        SaveOutcome(4, error="taken over", exit_code=int(ExitCode.RUN_IN_USE)),
    ]
    found.writer = SimpleNamespace(settle=lambda: outcomes.pop(0), poll=lambda: None, take_events=list)
    assert found.settle() is False
    assert events == [("save_failed", {"step": 3, "error": "the disk is full"})]
    with pytest.raises(RunInUseError, match="taken over"):
        found.settle()


def test_an_end_that_was_told_already_is_not_told_again(tmp_path):
    found, _, _, events = saving(tmp_path)
    done = Published(3, tmp_path, 10, True, {"total": 1.0})
    polled = [SaveOutcome(3, done)]
    found.writer = SimpleNamespace(
        settle=lambda: SaveOutcome(3, done, first_seen=False),
        poll=lambda: polled.pop() if polled else None,
        take_events=list,
    )
    found.tell()
    assert found.settle() is True
    assert found.last_saved_step == 3
    assert len(events) <= 1


def test_a_person_may_ask_for_a_save_whatever_the_schedule(tmp_path):
    found, stop, _, _ = saving(tmp_path, every_steps=100)
    assert (found.every_steps, found.is_wanted(5)) == (100, False)
    stop.ask_save()
    assert found.is_wanted(5) is True
    assert found.is_wanted(5) is False


def test_the_clock_of_rank_0_decides_where_minutes_do(tmp_path):
    found, _, _, _ = saving(tmp_path, every_steps=None, every_minutes=1e-9)
    assert found.every_steps is None
    assert found.is_wanted(1) is True
