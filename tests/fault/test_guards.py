"""104 injected NaN and infinities and 30 spikes on one of two ranks: one decision on both, no byte changed, the run goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.guard_worker import NAN_STEPS, SPIKE_STEPS, Injection, nan_plan, spike_plan
from tests.support.matrix_worker import PRECISIONS, STAGES
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

PLANS: dict[str, tuple[dict[int, Injection], int]] = {
    **{
        f"nan z{stage} {precision}": (nan_plan(number, ranks=2), NAN_STEPS)
        for number, (stage, precision) in enumerate((s, p) for s in STAGES for p in PRECISIONS)
    },
    "spike z1 fp32": (spike_plan(99, ranks=2), SPIKE_STEPS),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("guards")
    with zygote.start_module("tests.support.guard_worker", str(root), log_folder=root / "logs") as job:
        job.succeed(timeout_s=240)
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_what_is_injected_is_enough_and_hits_every_kind_and_rank() -> None:
    injected = [(name, step, i) for name, (plan, _) in PLANS.items() for step, i in plan.items()]
    nans = [i for name, _, i in injected if name.startswith("nan")]
    assert (len(nans), len(injected) - len(nans)) == (104, 30)
    assert {(i.kind, i.rank) for i in nans} == {(kind, rank) for kind in ("loss", "gradient") for rank in (0, 1)}


@pytest.mark.parametrize("name", PLANS)
def test_both_ranks_decide_alike_at_every_step_from_the_same_numbers(ranks: list[dict[str, Any]], name: str) -> None:
    for one, two in zip(ranks[0][name]["steps"], ranks[1][name]["steps"], strict=True):
        for key in ("step", "verdict", "applied", "loss", "norm"):
            assert one[key] == two[key], (one["step"], key)


@pytest.mark.parametrize("name", PLANS)
def test_an_injected_step_changes_no_byte_and_every_other_is_taken(ranks: list[dict[str, Any]], name: str) -> None:
    plan, steps = PLANS[name]
    for rank, found in enumerate(ranks):
        assert [told["step"] for told in found[name]["steps"]] == list(range(steps)), "judged once a step"
        for told in found[name]["steps"]:
            injection = plan.get(told["step"])
            where = (rank, told["step"], injection)
            assert told["applied"] is (injection is None), where
            assert told["unchanged"] is (injection is not None), where
            assert bool(told["fired"]) is (injection is not None and injection.rank == rank), where


@pytest.mark.parametrize("name", PLANS)
def test_the_fault_is_named_for_what_it_is(ranks: list[dict[str, Any]], name: str) -> None:
    plan, _ = PLANS[name]
    expected = {"loss": "non_finite_loss", "gradient": "non_finite_gradient", "spike": "loss_spike"}
    for told in ranks[0][name]["steps"]:
        injection = plan.get(told["step"])
        kinds = {fault["kind"] for fault in told["verdict"]["faults"]}
        assert (expected[injection.kind] in kinds) if injection else not kinds, told


@pytest.mark.parametrize("name", PLANS)
def test_the_end_is_byte_for_byte_that_of_a_run_without_those_steps(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert found[name]["final"] == found[name]["reference"]
