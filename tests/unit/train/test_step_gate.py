"""The gate asks once a step, with what is known then, and never while there is no judge."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.train.step_gate import StepGate


class Recorder:
    def __init__(self, answer: bool) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, **numbers: Any) -> bool:
        self.asked.append(numbers)
        return self.answer


def test_without_a_judge_everything_is_admitted() -> None:
    gate = StepGate(lambda: 1.0)
    assert gate()
    gate.prepare(None, loss=1.0)
    assert gate()
    assert gate.finish()


@pytest.mark.parametrize("answer", [True, False])
def test_several_calls_of_one_step_ask_once_and_get_one_answer(answer: bool) -> None:
    judge, gate = Recorder(answer), StepGate(lambda: 3.0)
    gate.prepare(judge, loss=2.0)
    assert [gate(), gate(), gate(), gate.finish()] == [answer] * 4
    assert judge.asked == [{"loss": 2.0, "gradient_norm": 3.0, "overflowed": False}]


def test_a_step_whose_optimizer_was_not_reached_is_told_as_an_overflow() -> None:
    judge, gate = Recorder(False), StepGate(lambda: float("inf"))
    gate.prepare(judge, loss=2.0)
    assert gate.finish(), "it was not the judge who left it out"
    assert judge.asked == [{"loss": 2.0, "gradient_norm": float("inf"), "overflowed": True}]


def test_each_step_is_judged_anew_and_the_gate_is_open_between_steps() -> None:
    gate = StepGate(lambda: 1.0)
    for answer in (False, True, False):
        gate.prepare(Recorder(answer), loss=0.0)
        assert gate() is answer
        gate.finish()
        assert gate()


def test_the_norm_of_a_step_is_read_once() -> None:
    norms = iter([3.0, 4.0, 5.0])
    gate = StepGate(lambda: next(norms))
    gate.prepare(Recorder(True), loss=2.0)
    gate()
    gate.finish()
    assert [gate.gradient_norm(), gate.gradient_norm()] == [3.0, 3.0]
    gate.prepare(None, loss=2.0)
    gate()
    gate.finish()
    assert [gate.gradient_norm(), gate.gradient_norm()] == [4.0, 4.0], "nobody judged it"
