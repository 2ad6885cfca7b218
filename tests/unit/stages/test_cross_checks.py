"""What ranks compare, with the other ranks' answers made up."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from dstrain.base.errors import ConfigError, MachineError
from dstrain.base.protocols import RunState, StepReport
from dstrain.base.world import World
from dstrain.health.consistency import ConsistencyConfig
from dstrain.health.stragglers import StragglerConfig
from dstrain.stages import cross_checks
from dstrain.stages.cross_checks import CrossChecks, agree_on_start, tell_mixed_devices


class Control:
    """Three ranks: this one is rank 0, `change` makes the answer of rank 2 out of its own."""

    def __init__(self, change=lambda value: value):
        self.world, self.change, self.asked = World(rank=0, size=3), change, 0

    def gather_json(self, value):
        self.asked += 1
        return [value, copy.deepcopy(value), self.change(copy.deepcopy(value))]


def checks(control, *, zero_stage=1, every=10, window=2):
    events, figures = [], []
    config = SimpleNamespace(
        consistency=ConsistencyConfig(check_every=every),
        stragglers=StragglerConfig(every_steps=window, windows=1),
        engine=SimpleNamespace(zero_stage=zero_stage),
    )
    monitor = SimpleNamespace(
        event=lambda name, **fields: events.append((name, fields)),
        ranks=lambda step, found: figures.append((step, found)),
    )
    found = CrossChecks(config, control, weights=lambda: [torch.ones(8)], monitor=monitor, hosts=["a", "b", "c"])
    found.figures = figures
    return found, events


def report(step, *, forward_s=0.4, data=0.0):
    seconds = {"data": data, "forward_backward": 0.8, "step": 0.2, "total": 1.0 + data}
    return StepReport(
        step=step, loss=1.0, accuracy=0.0, gradient_norm=1.0, learning_rate=1e-3, applied=True, num_tokens=1, num_targets=1,
        num_rows=1, padded_tokens=1, ledger=1, epoch=0.0, seconds=seconds, forward_s=forward_s,
    )  # fmt: skip


def test_equal_weights_are_compared_when_due_and_only_then():
    control = Control()
    found, events = checks(control, window=1000)
    for step in range(1, 31):
        found.on_step(RunState(), report(step))
    assert (control.asked, events) == (3, [])


def test_a_diverged_rank_is_named_and_ends_the_run():
    control = Control(_changed)
    found, events = checks(control, every=1, window=1000)
    with pytest.raises(MachineError, match="rank 2"):
        found.on_step(RunState(), report(1))
    assert events[0][0] == "weights_diverged"
    assert events[0][1]["ranks"] == [2]


def _changed(value):
    """The same answer with another fingerprint, whatever its form."""
    if isinstance(value, dict):
        return {k: _changed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(value[0]), *value[1:]]
    return value + 1 if isinstance(value, int) else str(int(value) + 1)


def test_zero_3_and_a_single_rank_have_nothing_to_compare():
    control = Control()
    found, _ = checks(control, zero_stage=3, every=1, window=1000)
    found.on_step(RunState(), report(1))
    assert control.asked == 0
    assert "ZeRO 3" in found.replicas.not_applicable


@pytest.mark.parametrize(("slow", "cause"), [({"compute": 0.8}, "compute"), ({"data": 0.5}, "data")])
def test_the_slow_rank_and_its_part_are_told(slow, cause):
    control = Control(lambda parts: {**parts, **slow, "communication": 0.0})
    found, events = checks(control, every=None)
    for step in range(1, 5):
        found.on_step(RunState(), report(step))
    name, fields = events[0]
    assert (name, fields["rank"], fields["host"], fields["cause"]) == ("straggler", 2, "c", cause)


def test_how_evenly_the_ranks_work_is_told_after_every_window():
    control = Control(lambda parts: {**parts, "compute": 0.8, "communication": 0.0})
    found, _ = checks(control, every=None)
    for step in range(1, 6):
        found.on_step(RunState(), report(step))
    assert [step for step, _ in found.figures] == [2, 4]
    assert (found.figures[0][1]["slowest"], found.figures[0][1]["work_over_median"]) == (2.0, pytest.approx(2.0))


@pytest.mark.parametrize("devices", [["H100"], ["H100"] * 8, ["AMD EPYC"] * 2])
def test_devices_of_one_kind_are_no_news(devices, messages):
    tell_mixed_devices(devices, None, is_first=True)
    assert messages == []


def test_devices_of_different_kinds_are_told_once(messages):
    events = []
    monitor = SimpleNamespace(event=lambda name, **fields: events.append((name, fields)))
    for rank in range(3):
        tell_mixed_devices(["A100", "H100", "H100"], monitor, is_first=rank == 0)
    assert events == [("mixed_devices", {"devices": {"H100": 2, "A100": 1}})]
    (line,) = messages
    assert "2 on H100, 1 on A100" in line


def test_ranks_with_another_configuration_data_or_code_do_not_start(monkeypatch):
    monkeypatch.setattr(cross_checks, "to_plain", lambda config: config)
    agree_on_start(Control(), {"seed": 0}, {"plan": 1})

    def with_fact(name):
        return Control(lambda told: {**told, "facts": {**told["facts"], name: "other"}})

    for name, kind in (
        ("configuration", ConfigError),
        ("data", ConfigError),
        ("code", MachineError),
        ("torch", MachineError),
    ):
        with pytest.raises(kind, match=name):
            agree_on_start(with_fact(name), {"seed": 0}, {"plan": 1})
