"""A plan's parts fit together: batches, memory, time, money."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.planner.plan import accumulation_of, make_plan, useful_flops
from dstrain.train.footprint import footprint, scaled
from tests.support.planned import site, workload


def test_a_plan_adds_up() -> None:
    plan = make_plan(workload(), site(gpus=16))
    assert plan.sharding.accumulation * plan.micro_batch * 16 == 1024
    assert plan.tokens_per_second * plan.step.total == pytest.approx(1024 * 512)
    assert plan.cost.tokens == 70_000 * 1024 * 512
    assert plan.cost.useful_hours == pytest.approx(70_000 * plan.step.total / 3600)
    assert plan.cost.gpu_hours == pytest.approx(16 * plan.cost.hours)
    assert plan.cost.hours == pytest.approx(plan.cost.useful_hours / plan.reliability.goodput)
    assert plan.utilisation == pytest.approx(plan.tokens_per_second * useful_flops(workload()) / 16 / 989e12)
    assert plan.fits


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 512))
def test_every_row_of_a_step_finds_a_micro_batch(rows: int, ranks: int, micro_batch: int) -> None:
    work = workload(global_batch=rows)
    if ranks > rows:
        with pytest.raises(ConfigError, match="some would have nothing to do"):
            accumulation_of(work, ranks=ranks, micro_batch=micro_batch)
        return
    accumulation = accumulation_of(work, ranks=ranks, micro_batch=micro_batch)
    assert accumulation * micro_batch * ranks >= rows
    assert (accumulation - 1) * micro_batch < -(-rows // ranks)


def test_the_stage_table_says_what_a_plan_at_that_stage_says() -> None:
    table = make_plan(workload(), site()).stages
    for row in table:
        plan = make_plan(workload(), site(), stage=row.stage)
        assert (row.total_bytes, row.step_s) == (plan.memory.total, plan.step.total)
        best = make_plan(workload(), site(), stage=row.stage, micro_batch=row.largest_micro_batch)
        assert best.fits


def test_a_billion_parameters_do_not_fit_a_consumer_card_unsharded() -> None:
    plan = make_plan(workload("MPT-1B", micro_batch=1), site("4090"))
    assert not make_plan(workload("MPT-1B", micro_batch=1), site("4090"), stage=0).fits
    assert plan.stages[0].largest_micro_batch == 0
    assert plan.stages[2].largest_micro_batch > 0


def test_more_devices_take_less_time_and_more_money() -> None:
    plans = [make_plan(workload(), site(gpus=n)) for n in (8, 64, 512)]
    hours, money = [p.cost.hours for p in plans], [p.cost.money for p in plans]
    assert hours == sorted(hours, reverse=True)
    assert money == sorted(money)


def test_memory_is_that_of_the_micro_batch_on_the_rank_with_most_rows() -> None:
    plan = make_plan(workload(global_batch=100, micro_batch=64), site())
    assert plan.micro_batch == 13  # 100 rows on 8 ranks
    one = footprint(plan.workload.anatomy, plan.sharding, scaled(plan.batch, 1), device="cuda")
    assert plan.memory == one


def test_failures_faster_than_saves_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the run would never end; give --mtbf-hours of one GPU"):
        make_plan(workload(), replace(site(gpus=1024), device_hours_per_failure=0.001))
