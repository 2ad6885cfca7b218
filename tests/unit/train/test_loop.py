"""The loop with an engine made of numbers: order at the boundary, stop, skips, counters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dstrain.base.errors import DataError, NoProgressError
from dstrain.base.protocols import PHASES, Interrupted, RunState, StepData, StepFlags, StepReport
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.health.guards import GuardConfig, Guards, Verdict
from dstrain.train.engine import StepTotals
from dstrain.train.loop import Boundary, Ending, advance, train
from dstrain.train.step_gate import Judge


class FakeEngine:
    """Answers with totals made of the step's number; skips the steps it is told to."""

    def __init__(
        self, *, skip: Callable[[int], bool] = lambda step: False, loss: Callable[[int], float] = lambda step: 1.0
    ) -> None:  # fmt: skip
        self.skip, self.loss = skip, loss
        self.asked: list[tuple[int, float, bool]] = []

    def train_step(
        self, data: StepData, *, step: int, learning_rate: float, flags: StepFlags, judge: Judge
    ) -> StepTotals:
        self.asked.append((step, learning_rate, flags.stop))
        overflowed, loss = self.skip(step), self.loss(step)
        admitted = judge(loss=loss, gradient_norm=math.inf if overflowed else 1.0, overflowed=overflowed)
        return StepTotals(
            loss=loss, accuracy=0.5, gradient_norm=1.0, applied=admitted and not overflowed, num_targets=3, num_tokens=10 + step,
            num_rows=4, padded_tokens=16, ledger=LEDGER_MODULUS // 2 + step, flags=flags,
            damaged=data.damaged, forward_s=0.0, forward_backward_s=0.0, step_s=0.0, epoch=data.epoch,
        )  # fmt: skip


class Witness:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def on_step(self, state: RunState, report: StepReport) -> None:
        self.log.append(("step", report.step))

    def on_end(self, state: RunState) -> None:
        self.log.append(("end", state.step))


def run(
    engine: FakeEngine, *, max_steps: int = 6, first: int = 0, stop_at: int | None = None, guards: Guards | None = None,
    log: list[Any] | None = None, **boundary: Any,
) -> tuple[Ending, RunState]:  # fmt: skip
    state = RunState(step=first)
    ending = train(
        engine=engine,  # type: ignore[arg-type]
        steps=((n, StepData([], 4, 16, 0, 0.5)) for n in range(first, max_steps)),
        state=state,
        max_steps=max_steps,
        learning_rate=lambda step: step / 10,
        observers=[Witness(log if log is not None else [])],
        boundary=Boundary(**boundary),
        flags=lambda: StepFlags(stop=stop_at is not None and len(engine.asked) + first >= stop_at),
        guards=guards or Guards(GuardConfig(skips_limit=3)),
    )
    return ending, state


def actions(log: list[Any], *, best: Callable[[int], bool] = lambda step: False) -> dict[str, Any]:
    def evaluate(step: int) -> bool:
        log.append(("evaluate", step))
        return best(step)

    return {"evaluate": evaluate, "save": lambda step: log.append(("save", step))}


def test_each_step_gets_its_own_rate_and_the_loop_ends_complete() -> None:
    engine = FakeEngine()
    ending, state = run(engine, max_steps=3)
    assert (ending, state.step) == (Ending.COMPLETE, 3)
    assert engine.asked == [(0, 0.0, False), (1, 0.1, False), (2, 0.2, False)]


def test_a_resumed_run_goes_on_from_its_step() -> None:
    engine = FakeEngine()
    _, state = run(engine, first=4, max_steps=6)
    assert [asked[0] for asked in engine.asked] == [4, 5]
    assert state.step == 6


def test_at_a_boundary_evaluation_comes_before_saving_and_both_come_at_the_end() -> None:
    log: list[Any] = []
    run(FakeEngine(), max_steps=5, log=log, evaluate_every=2, save_every=2, **actions(log))
    assert log == [
        ("step", 1), ("step", 2), ("evaluate", 2), ("save", 2), ("step", 3), ("step", 4), ("evaluate", 4), ("save", 4),
        ("step", 5), ("evaluate", 5), ("save", 5), ("end", 5),
    ]  # fmt: skip


def test_a_new_best_is_saved_at_once_and_only_once() -> None:
    log: list[Any] = []
    run(
        FakeEngine(),
        max_steps=6,
        log=log,
        evaluate_every=2,
        save_every=4,
        **actions(log, best=lambda step: step in (2, 4)),
    )
    assert [entry for entry in log if entry[0] == "save"] == [("save", 2), ("save", 4), ("save", 6)]


def test_without_a_rhythm_there_is_one_evaluation_and_one_save_at_the_end() -> None:
    log: list[Any] = []
    run(FakeEngine(), max_steps=4, log=log, **actions(log))
    assert [entry for entry in log if entry[0] not in ("step", "end")] == [("evaluate", 4), ("save", 4)]


def test_a_step_that_is_on_disk_already_is_not_saved_again() -> None:
    log: list[Any] = []
    boundary = Boundary(**actions(log), last_saved=4)
    boundary.save_now(4)
    boundary.save_now(5)
    assert log == [("save", 5)]


@pytest.mark.parametrize("save_every", [None, 3])
def test_a_stop_leaves_at_the_next_boundary_after_one_save(save_every: int | None) -> None:
    log: list[Any] = []
    ending, state = run(FakeEngine(), stop_at=2, log=log, save_every=save_every, **actions(log))
    assert (ending, state.step) == (Ending.STOPPED, 3)
    assert [entry for entry in log if entry[0] == "save"] == [("save", 3)]
    assert log[-1] == ("end", 3)


def test_a_stop_at_the_last_step_is_a_complete_run() -> None:
    log: list[Any] = []
    ending, state = run(FakeEngine(), max_steps=3, stop_at=2, log=log, **actions(log))
    assert (ending, state.step) == (Ending.COMPLETE, 3)
    assert log.count(("save", 3)) == 1


def test_too_many_skipped_steps_in_a_row_end_the_run_with_advice_and_without_a_save() -> None:
    log: list[Any] = []
    with pytest.raises(
        NoProgressError, match=r"step 4: 3 updates in a row .* not finite: lower optimizer\.learning_rate"
    ):
        run(FakeEngine(skip=lambda step: step >= 1), log=log, save_every=4, **actions(log))
    assert ("save", 4) not in log


def test_a_good_step_ends_a_row_of_skipped_ones() -> None:
    _, state = run(FakeEngine(skip=lambda step: step % 3 != 2), max_steps=12)
    assert (state.step, state.skipped_steps) == (12, 8)


def test_in_fp16_skipped_steps_are_the_loss_scale_at_work() -> None:
    ending, state = run(
        FakeEngine(skip=lambda step: True), max_steps=6, guards=Guards(GuardConfig(skips_limit=3), loss_scaling=True)
    )
    assert (ending, state.skipped_steps) == (Ending.COMPLETE, 6)


def test_counters_add_up_and_the_ledger_wraps() -> None:
    _, state = run(FakeEngine(), max_steps=3)
    assert (state.rows, state.tokens) == (12, 10 + 11 + 12)
    assert state.ledger == (3 * (LEDGER_MODULUS // 2) + 0 + 1 + 2) % LEDGER_MODULUS
    assert state.compute_seconds > 0


def test_counters_do_not_depend_on_where_a_run_was_cut() -> None:
    _, whole = run(FakeEngine(), max_steps=6)
    _, first = run(FakeEngine(), max_steps=3)
    _, second = run(FakeEngine(), first=3, max_steps=6)
    assert whole.tokens == first.tokens + second.tokens
    assert whole.ledger == (first.ledger + second.ledger) % LEDGER_MODULUS


def test_the_report_holds_every_part_of_the_time_and_they_add_up() -> None:
    reports: list[StepReport] = []

    class Keep(Witness):
        def on_step(self, state: RunState, report: StepReport) -> None:
            reports.append(report)

    log: list[Any] = []
    train(
        engine=FakeEngine(), steps=((n, StepData([], 4, 16, 0, 0.5)) for n in range(3)), state=RunState(), max_steps=3,  # type: ignore[arg-type]
        learning_rate=lambda step: 0.1, observers=[Keep(log)], boundary=Boundary(**actions(log), save_every=1),
        flags=StepFlags, guards=Guards(GuardConfig()),
    )  # fmt: skip
    assert "save" not in reports[0].seconds
    assert "save" in reports[1].seconds, "a save is told with the step after it"
    for report in reports:
        parts = dict(report.seconds)
        total = parts.pop("total")
        assert sum(parts.values()) == pytest.approx(total, abs=1e-6)
        assert (report.epoch, report.learning_rate) == (0.5, 0.1)


def test_a_skipped_step_counts_as_a_step_and_its_data_as_consumed() -> None:
    state = RunState(step=4, rows=10)
    report = StepReport(
        step=5, loss=1.0, accuracy=0.0, gradient_norm=float("inf"), learning_rate=0.1, applied=False, num_tokens=7,
        num_targets=1, num_rows=2, padded_tokens=8, ledger=3, epoch=0.1,
    )  # fmt: skip
    advance(state, report)
    assert (state.step, state.rows, state.tokens, state.ledger, state.skipped_steps) == (5, 12, 7, 3, 1)


def test_a_fault_of_the_data_is_handed_to_the_engine_as_that_step_so_that_ranks_can_agree() -> None:
    class Agreeing(FakeEngine):
        def train_step(self, data: Any, **options: Any) -> StepTotals:
            self.asked.append((options["step"], 0.0, False))
            if isinstance(data, DataError):
                raise data
            self.asked.pop()
            return super().train_step(data, **options)

    def steps() -> Iterator[tuple[int, StepData]]:
        yield 4, StepData([], 4, 16, 0, 0.5)
        raise DataError("shard-000001.tar is damaged")

    engine, state = Agreeing(), RunState(step=4)
    with pytest.raises(DataError, match="shard-000001"):
        train(
            engine=engine, steps=steps(), state=state, max_steps=9, learning_rate=lambda step: 0.1, observers=[],  # type: ignore[arg-type]
            boundary=Boundary(), flags=StepFlags, guards=Guards(GuardConfig()),
        )  # fmt: skip
    assert [asked[0] for asked in engine.asked] == [4, 5]
    assert state.step == 5


def test_damage_is_told_once_the_step_is_counted_and_before_anything_is_saved() -> None:
    log: list[Any] = []
    data = [StepData((), num_rows=4, padded_tokens=16, ledger=0, epoch=0.0) for _ in range(3)]
    data[1] = dataclasses.replace(data[1], damaged=(("wiki", 7),))
    state = RunState()
    train(
        engine=FakeEngine(), steps=enumerate(data), state=state, max_steps=3, learning_rate=lambda step: 0.0,  # type: ignore[arg-type]
        observers=[], boundary=Boundary(save=lambda step: log.append(("save", step)), save_every=1),
        flags=StepFlags, guards=Guards(GuardConfig()), on_damage=lambda step, blocks: log.append((step, blocks)),
    )  # fmt: skip
    assert log == [("save", 1), (2, (("wiki", 7),)), ("save", 2), ("save", 3)]


def asking(wanted: dict[int, StepFlags]) -> Callable[[], StepFlags]:
    """Flags by the number of the poll, from 0."""
    polls = iter(range(1000))
    return lambda: wanted.get(next(polls), StepFlags())


def run_asking(wanted: dict[int, StepFlags], *, max_steps: int = 4, state: RunState | None = None,
               steps: Any = None, **boundary: Any) -> tuple[Ending, RunState, Boundary]:  # fmt: skip
    state = state or RunState()
    between = Boundary(**boundary)
    ending = train(
        engine=FakeEngine(), steps=steps or ((n, StepData([], 4, 16, 0, 0.5)) for n in range(state.step, max_steps)),  # type: ignore[arg-type]
        state=state, max_steps=max_steps, learning_rate=lambda step: 0.0, observers=[], boundary=between,
        flags=asking(wanted), guards=Guards(GuardConfig()),
    )  # fmt: skip
    return ending, state, between


def test_a_save_that_is_wanted_comes_at_the_next_boundary_and_the_run_goes_on() -> None:
    log: list[Any] = []
    ending, state, _ = run_asking({1: StepFlags(save_wanted=True)}, **actions(log))
    assert (ending, state.step) == (Ending.COMPLETE, 4)
    assert log == [("save", 2), ("evaluate", 4), ("save", 4)]


def test_a_failed_save_is_settled_at_the_next_boundary_on_all_ranks_and_tried_again_when_due() -> None:
    log: list[Any] = []
    answers = iter([False, True])

    def settle() -> bool:
        log.append("settle")
        return next(answers)

    run_asking({1: StepFlags(save_failed=True)}, settle=settle, **actions(log), last_saved=2)
    assert log == ["settle", ("evaluate", 4), ("save", 4), "settle"]


def test_a_stop_after_a_failed_save_of_the_same_step_saves_again() -> None:
    log: list[Any] = []
    answers = iter([False, True])
    _, _, boundary = run_asking(
        {2: StepFlags(stop=True, save_failed=True)}, last_saved=3, settle=lambda: next(answers), **actions(log)
    )
    assert log == [("save", 3)]
    assert boundary.last_saved == 3


def test_the_save_in_flight_is_waited_for_before_the_loop_leaves() -> None:
    for wanted in ({}, {1: StepFlags(stop=True)}, {1: StepFlags(hurry=True)}):
        log: list[Any] = []
        run_asking(wanted, settle=lambda log=log: log.append("settled") or True, **actions(log))
        assert log[-2:] == [("save", 2 if wanted else 4), "settled"]


def test_a_save_that_fails_while_leaving_is_not_called_saved() -> None:
    _, _, boundary = run_asking({1: StepFlags(stop=True)}, settle=lambda: False, **actions([]))
    assert boundary.last_saved == -1


def test_a_stop_takes_the_place_of_an_evaluation_that_the_next_run_makes_up_for() -> None:
    log: list[Any] = []
    ending, state, _ = run_asking({1: StepFlags(stop=True)}, evaluate_every=2, **actions(log))
    assert (ending, state.step, state.evaluation_due) == (Ending.STOPPED, 2, True)
    assert log == [("save", 2)]
    again: list[Any] = []
    ending, state, _ = run_asking({}, state=state, evaluate_every=2, last_saved=2, **actions(again))
    assert (ending, state.evaluation_due) == (Ending.COMPLETE, False)
    assert again == [("evaluate", 2), ("evaluate", 4), ("save", 4)]


def test_a_hurry_leaves_the_last_evaluation_out() -> None:
    log: list[Any] = []
    ending, state, _ = run_asking({3: StepFlags(stop=True, hurry=True)}, **actions(log))
    assert (ending, state.step, state.evaluation_due) == (Ending.STOPPED, 4, True)
    assert log == [("save", 4)]


def test_an_evaluation_that_was_interrupted_is_followed_by_a_save_and_the_end() -> None:
    log: list[Any] = []

    def evaluate(step: int) -> bool:
        raise Interrupted

    ending, state, _ = run_asking({}, evaluate_every=2, **{**actions(log), "evaluate": evaluate})
    assert (ending, state.step, state.evaluation_due) == (Ending.STOPPED, 2, True)
    assert log == [("save", 2)]
    ending, _, _ = run_asking({}, state=state, last_saved=2, **{**actions(log), "evaluate": evaluate})
    assert (ending, log) == (Ending.STOPPED, [("save", 2)])


def test_a_rank_that_does_not_wait_for_its_data_hands_that_on_and_the_loop_saves_and_leaves() -> None:
    class Agreeing(FakeEngine):
        def train_step(self, data: Any, **options: Any) -> StepTotals:
            if isinstance(data, Interrupted):
                raise data
            return super().train_step(data, **options)

    def steps() -> Iterator[tuple[int, StepData]]:
        yield 0, StepData([], 4, 16, 0, 0.5)
        raise Interrupted

    log: list[Any] = []
    ending = train(
        engine=Agreeing(), steps=steps(), state=RunState(), max_steps=9, learning_rate=lambda step: 0.1, observers=[],  # type: ignore[arg-type]
        boundary=Boundary(**actions(log)), flags=StepFlags, guards=Guards(GuardConfig()),
    )  # fmt: skip
    assert (ending, log) == (Ending.STOPPED, [("save", 1)])


def test_progress_is_told_what_the_loop_does() -> None:
    class Heard:
        def __init__(self) -> None:
            self.phases: list[tuple[str, int]] = []

        def enter(self, phase: str, step: int) -> None:
            self.phases.append((phase, step))

    heard = Heard()
    run_asking({}, max_steps=2, progress=heard, save_every=1, settle=lambda: True, **actions([]))
    assert heard.phases == [
        ("data", 0), ("step", 0), ("save", 1), ("data", 1), ("step", 1), ("evaluate", 2), ("save", 2), ("data", 2), ("save", 2),
    ]  # fmt: skip
    assert {phase for phase, _ in heard.phases} == set(PHASES)


SHORT = GuardConfig(history_steps=8, least_history=4, sustained_steps=2, back_steps=2, skip_before=1, skip_after=3)


def test_a_loss_that_is_not_finite_is_left_out_told_and_the_run_goes_on() -> None:
    told: list[Verdict] = []
    log: list[Any] = []
    state = RunState()
    train(
        engine=FakeEngine(loss=lambda step: math.nan if step == 1 else 1.0), state=state, max_steps=3,  # type: ignore[arg-type]
        steps=((n, StepData([], 4, 16, 0, 0.5)) for n in range(3)), learning_rate=lambda step: 0.0, observers=[Witness(log)],
        boundary=Boundary(), flags=StepFlags, guards=Guards(SHORT), on_fault=lambda verdict: told.append(verdict) or log.append("told"),
    )  # fmt: skip
    assert (state.step, state.skipped_steps) == (3, 1)
    assert [(verdict.step, verdict.action) for verdict in told] == [(1, "skip")]
    assert log == [("step", 1), ("step", 2), "told", ("step", 3), ("end", 3)]


def test_a_lasting_spike_leaves_for_a_roll_back_after_the_save_in_flight_and_without_another() -> None:
    log: list[Any] = []
    guards = Guards(SHORT)
    ending, state = run(
        FakeEngine(loss=lambda step: 9.0 if step >= 6 else 1.0), max_steps=20, guards=guards, log=log,
        save_every=4, settle=lambda: log.append("settled") or True, **actions(log),
    )  # fmt: skip
    assert (ending, state.step) == (Ending.ROLL_BACK, 8)
    assert [entry for entry in log if entry[0] in ("save", "end")] == [("save", 4)]
    assert log[-1] == "settled"
    back = guards.verdict.roll_back
    assert back is not None
    assert (back.onset, back.before, back.first, back.last) == (6, 4, 5, 11)


def test_a_spike_stops_the_run_where_that_is_the_policy_and_nothing_bad_is_saved() -> None:
    log: list[Any] = []
    config = SHORT.model_copy(update={"loss_spike": "stop", "sustained_steps": 1})
    with pytest.raises(NoProgressError, match=r"step 6: the loss 9 lies .* above the usual 1"):
        run(
            FakeEngine(loss=lambda step: 9.0 if step == 5 else 1.0),
            guards=Guards(config),
            log=log,
            save_every=3,
            **actions(log),
        )
    assert [entry for entry in log if entry[0] == "save"] == [("save", 3)]
