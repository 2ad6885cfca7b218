"""Each policy, each limit, and the same decision from the same numbers wherever they are judged."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.guards import Action, GuardConfig, Guards, RollBack, Verdict, describe

NAN, INF = math.nan, math.inf
SMALL: dict[str, Any] = {
    "history_steps": 16, "least_history": 8, "sustained_steps": 3, "back_steps": 4, "skip_before": 2, "skip_after": 5,
    "skips_limit": 4, "roll_backs_limit": 2, "roll_backs_steps": 1000,
}  # fmt: skip


def guards(*, loss_scaling: bool = False, phase_of: Any = lambda step: 0, **policies: Any) -> Guards:
    return Guards(GuardConfig(**{**SMALL, **policies}), loss_scaling=loss_scaling, phase_of=phase_of)


def usual(step: int) -> float:
    """A loss around 2 with a little noise."""
    return 2.0 + 0.01 * (step * 7 % 5)


def run(judge: Guards, losses: list[float], *, first: int = 0, norms: list[float] | None = None) -> list[Verdict]:
    return [
        judge.judge(first + i, loss=loss, gradient_norm=norms[i] if norms else 1.0) for i, loss in enumerate(losses)
    ]


def actions(verdicts: list[Verdict]) -> list[Action]:
    return [verdict.action for verdict in verdicts]


def trained(**options: Any) -> Guards:
    """After 20 sound steps."""
    judge = guards(**options)
    assert set(actions(run(judge, [usual(i) for i in range(20)]))) == {"go_on"}
    return judge


# --- not finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_skipped_from_the_first_step_on(loss: float) -> None:
    [verdict] = run(guards(), [loss])
    assert verdict.action == "skip"
    assert [fault.kind for fault in verdict.faults] == ["non_finite_loss"]


@pytest.mark.parametrize("norm", [NAN, INF])
def test_gradients_that_are_not_finite_are_skipped_also_when_the_engine_has_not_noticed(norm: float) -> None:
    for overflowed in (False, True):
        verdict = guards().judge(0, loss=1.0, gradient_norm=norm, overflowed=overflowed)
        assert verdict.action == "skip"
        assert [fault.kind for fault in verdict.faults] == ["non_finite_gradient"]


def test_nothing_not_finite_is_ever_admitted() -> None:
    assert actions(run(guards(non_finite="ignore"), [NAN])) == ["skip"]


@pytest.mark.parametrize("policy", ["roll_back", "stop"])
def test_other_policies_act_at_once(policy: str) -> None:
    assert trained(non_finite=policy).judge(20, loss=NAN, gradient_norm=1.0).action == policy


def test_too_many_in_a_row_stop_the_run() -> None:
    verdicts = run(guards(), [NAN] * 4)
    assert actions(verdicts) == ["skip", "skip", "skip", "stop"]
    assert verdicts[-1].reason == "4 updates in a row were left out, the last because the loss is nan"


def test_a_sound_step_ends_the_row() -> None:
    assert "stop" not in actions(run(guards(), [NAN, NAN, NAN, 1.0] * 5))


def test_an_overflow_under_loss_scaling_is_no_fault_and_ends_no_row() -> None:
    judge = guards(loss_scaling=True)
    for step in range(50):
        verdict = judge.judge(step, loss=1.0, gradient_norm=INF, overflowed=True)
        assert (verdict.action, verdict.faults) == ("go_on", ())
    row = [judge.judge(step, loss=NAN, gradient_norm=INF, overflowed=True).action for step in range(50, 53)]
    judge.judge(53, loss=1.0, gradient_norm=INF, overflowed=True)
    assert [*row, judge.judge(54, loss=NAN, gradient_norm=INF, overflowed=True).action] == ["skip"] * 3 + ["stop"]


# --- spikes --------------------------------------------------------------------------------------------------------


def test_a_single_spike_is_recorded_and_trained_on() -> None:
    verdict = trained().judge(20, loss=6.0, gradient_norm=1.0)
    assert verdict.action == "go_on"
    [fault] = verdict.faults
    assert (fault.kind, fault.value) == ("loss_spike", 6.0)
    assert fault.usual == pytest.approx(2.02, abs=0.02)
    assert fault.score > 6


def test_a_low_loss_is_no_spike() -> None:
    assert trained().judge(20, loss=0.1, gradient_norm=1.0).faults == ()


def test_before_enough_is_known_nothing_is_a_spike() -> None:
    assert run(guards(), [2.0] * 7 + [100.0])[-1].faults == ()
    assert run(guards(), [2.0] * 8 + [100.0])[-1].faults != ()


def test_noise_that_grows_with_the_loss_is_no_spike() -> None:
    """The floor: 12 % above a flat median is the least that can be one."""
    judge = guards(sigmas=6.0, least_deviation=0.02)
    run(judge, [2.0] * 20)
    assert judge.judge(20, loss=2.0 * 1.119, gradient_norm=1.0).faults == ()
    assert judge.judge(21, loss=2.0 * 1.121, gradient_norm=1.0).faults != ()


def test_a_lasting_spike_rolls_back_to_before_it_began_and_steps_over_its_data() -> None:
    judge = trained()
    verdicts = run(judge, [6.0, 7.0, 6.5], first=20)
    assert actions(verdicts) == ["go_on", "go_on", "roll_back"]
    assert verdicts[-1].roll_back == RollBack(onset=20, before=16, first=18, last=28)
    assert "the loss 6.5 lies" in verdicts[-1].reason


def test_a_sound_step_between_two_spikes_starts_the_count_anew() -> None:
    assert "roll_back" not in actions(run(trained(), [6.0, 6.0, 2.0, 6.0, 6.0, 2.0], first=20))


def test_near_the_start_a_roll_back_goes_to_the_start() -> None:
    judge = guards(back_steps=100, skip_before=100)
    run(judge, [2.0] * 9)
    back = run(judge, [9.0] * 3, first=9)[-1].roll_back
    assert back == RollBack(onset=9, before=0, first=0, last=17)


def test_skip_leaves_out_each_spike_at_once_until_the_limit() -> None:
    judge = trained(loss_spike="skip")
    assert actions(run(judge, [6.0, 2.0, 6.0], first=20)) == ["skip", "go_on", "skip"]
    assert actions(run(judge, [6.0] * 3, first=23)) == ["skip", "skip", "stop"]


def test_stop_waits_until_the_spike_lasts() -> None:
    assert actions(run(trained(loss_spike="stop"), [6.0] * 3, first=20)) == ["go_on", "go_on", "stop"]


def test_ignore_records_and_gets_used_to_a_level_that_stays() -> None:
    verdicts = run(trained(loss_spike="ignore"), [6.0 + 0.01 * (i % 3) for i in range(20)], first=20)
    assert set(actions(verdicts)) == {"go_on"}
    assert verdicts[0].faults != ()
    assert verdicts[-1].faults == ()


def test_another_phase_of_the_data_is_not_compared_with_the_one_before() -> None:
    judge = trained(phase_of=lambda step: int(step >= 20))
    assert all(v.faults == () for v in run(judge, [6.0 + 0.01 * (i % 3) for i in range(20)], first=20))
    assert judge.judge(40, loss=20.0, gradient_norm=1.0).faults != ()


def test_a_gradient_outlier_is_one_of_the_logarithm() -> None:
    for policy, expected in (("ignore", "go_on"), ("skip", "skip")):
        judge = trained(gradient_outlier=policy)
        assert judge.judge(20, loss=2.0, gradient_norm=3.0).faults == (), "a third of e^(6 · 0.2) above"
        verdict = judge.judge(21, loss=2.0, gradient_norm=4.0)
        assert verdict.action == expected
        assert [fault.kind for fault in verdict.faults] == ["gradient_outlier"]
        assert verdict.faults[0].usual == pytest.approx(1.0)


def test_where_the_norm_is_not_known_it_is_not_judged() -> None:
    assert all(v.faults == () for v in run(guards(), [2.0] * 30, norms=[0.0] * 30))


def test_the_severest_policy_wins() -> None:
    judge = trained(loss_spike="skip", gradient_outlier="stop", sustained_steps=1)
    assert judge.judge(20, loss=9.0, gradient_norm=99.0).action == "stop"


# --- roll-backs ----------------------------------------------------------------------------------------------------


def spike(judge: Guards, *, first: int) -> Verdict:
    return run(judge, [9.0] * 3, first=first)[-1]


def test_roll_backs_are_bounded_and_survive_the_state_they_go_back_to() -> None:
    judge = guards()
    run(judge, [usual(i) for i in range(16)])
    saved = json.loads(json.dumps(judge.state_dict()))
    for _ in range(2):
        run(judge, [usual(i) for i in range(4)], first=16)
        assert spike(judge, first=20).action == "roll_back"
        judge.rolled_back(saved)
        assert judge.state_dict()["losses"] == saved["losses"]
    run(judge, [usual(i) for i in range(4)], first=16)
    verdict = spike(judge, first=20)
    assert verdict.action == "stop"
    assert "after 2 roll-backs within 1000 steps" in verdict.reason


def test_old_roll_backs_no_longer_count() -> None:
    judge = trained(roll_backs_limit=1, roll_backs_steps=50)
    assert spike(judge, first=20).action == "roll_back"
    judge.rolled_back({})
    run(judge, [usual(i) for i in range(100)], first=10)
    assert spike(judge, first=110).action == "roll_back"


# --- the same everywhere -------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.sampled_from([2.0, 2.01, 1.99, 7.0, 9.0, NAN, INF]), st.sampled_from([1.0, 1.1, 50.0, INF, 0.0])),
    min_size=1, max_size=60,
)  # fmt: skip


@given(STEPS, st.integers(0, 60), st.sampled_from(["ignore", "skip", "roll_back", "stop"]))
def test_a_run_that_was_cut_and_restored_decides_as_the_whole_one(
    steps: list[tuple[float, float]], cut: int, policy: str
) -> None:
    whole, first, second = (guards(loss_spike=policy, gradient_outlier=policy) for _ in range(3))
    expected = [whole.judge(i, loss=a, gradient_norm=b) for i, (a, b) in enumerate(steps)]
    found = []
    for i, (loss, norm) in enumerate(steps):
        if i == cut:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found.append((first if i < cut else second).judge(i, loss=loss, gradient_norm=norm))
    assert [repr(verdict) for verdict in found] == [repr(verdict) for verdict in expected]


@given(STEPS)
def test_no_update_that_would_poison_the_weights_is_admitted(steps: list[tuple[float, float]]) -> None:
    judge = guards()
    for i, (loss, norm) in enumerate(steps):
        if judge.judge(i, loss=loss, gradient_norm=norm).action == "go_on":
            assert math.isfinite(loss)
            assert math.isfinite(norm)


def test_a_verdict_is_an_event() -> None:
    verdict = trained(non_finite="roll_back").judge(20, loss=NAN, gradient_norm=1.0)
    event = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert event["action"] == "roll_back"
    assert event["roll_back"] == {"onset": 20, "before": 16, "first": 18, "last": 26}
    assert event["faults"][0]["value"] == "nan"
    assert describe(verdict.faults[0]) == verdict.reason == "the loss is nan"


def test_a_checkpoint_from_before_guards_begins_without_history() -> None:
    judge = trained()
    judge.load_state_dict({})
    assert judge.state_dict() == guards().state_dict()


def test_the_state_is_small() -> None:
    judge = Guards(GuardConfig())
    for step in range(1000):
        judge.judge(step, loss=usual(step), gradient_norm=1.0 + step * 1e-3)
    assert len(json.dumps(judge.state_dict())) < 8000
