"""The search finds what planning everything by hand finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dstrain.base.errors import ConfigError
from dstrain.planner.devices import DEVICES
from dstrain.planner.plan import Plan, Site, make_plan
from dstrain.planner.search import Budget, gpu_counts, search, suggestable
from dstrain.planner.steptime import Stack
from tests.support.planned import site, workload

TWO = (DEVICES["a100"], DEVICES["h100"])


def test_the_best_is_the_cheapest_within_both_budgets() -> None:
    found = search(workload(), site(), Budget(money=1000, hours=10), devices=TWO, most_gpus=64)
    assert found.nearest is None
    assert all(plan.fits and plan.cost.money <= 1000 and plan.cost.hours <= 10 for plan in found.best)
    money = [plan.cost.money for plan in found.best]
    assert money == sorted(money)
    # By hand: no stage and micro-batch at any count is cheaper within the hours.
    for device in TWO:
        for gpus in gpu_counts(8, 64, 1024):
            for stage in range(4):
                for micro_batch in (16, 32, 64, 128):
                    place = site(device.name, gpus=gpus)
                    plan = make_plan(workload(), place, stage=stage, micro_batch=micro_batch, compare_stages=False)
                    if plan.fits and plan.cost.hours <= 10 and (stage or plan.sharding.accumulation == 1):
                        assert plan.cost.money >= money[0] * 0.999


def test_a_shorter_deadline_costs_more() -> None:
    relaxed, tight = (
        search(workload(), site(), Budget(hours=h), devices=TWO, most_gpus=256).best[0].cost for h in (48.0, 1.0)
    )
    assert tight.hours <= 1.0 < relaxed.hours
    assert tight.money > relaxed.money


def test_rows_and_steps_stay_what_they_are() -> None:
    for plan in search(workload(), site(), Budget(hours=10), devices=TWO, most_gpus=64).best:
        assert plan.cost.tokens == workload().tokens
        assert plan.micro_batch * plan.sharding.accumulation * plan.site.cluster.gpus >= 1024


def test_an_impossible_budget_gets_the_nearest() -> None:
    found = search(workload(), site(), Budget(money=1.0), devices=TWO, most_gpus=64)
    assert found.best == ()
    assert found.nearest is not None
    cheapest = search(workload(), site(), Budget(money=1e9), devices=TWO, most_gpus=64).best[0]
    assert found.nearest.cost.money == cheapest.cost.money


def test_a_device_without_a_price_is_left_out_and_none_at_all_is_refused() -> None:
    prices = site().prices
    only = replace(site(), prices=prices.model_copy(update={"devices": {"a100": prices.devices["a100"]}}))
    found = search(workload(), only, Budget(hours=1e6), devices=TWO, most_gpus=16)
    assert {plan.site.cluster.device.name for plan in found.best} == {"a100"}
    nothing = replace(site(), prices=prices.model_copy(update={"devices": {}}))
    with pytest.raises(ConfigError, match="none of the devices to choose from has a price"):
        search(workload(), nothing, Budget(hours=1), devices=TWO, most_gpus=16)


def test_a_model_that_fits_nowhere_is_refused() -> None:
    huge = workload("MPT-3B", sequence_length=65536, context=65536.0)
    with pytest.raises(ConfigError, match="does not fit 4090 at any stage"):
        search(huge, site(), Budget(hours=1), devices=(DEVICES["4090"],), most_gpus=8)


def test_counts_are_whole_nodes_and_no_more_than_rows() -> None:
    assert gpu_counts(8, 64, 1024) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert max(gpu_counts(8, 1024, 100)) <= 100
    assert gpu_counts(4, 16, 16) == [1, 2, 4, 8, 12, 16]


def test_suggestable_devices_are_gpus() -> None:
    assert all(device.is_gpu for device in suggestable(None))
    assert [device.name for device in suggestable(["h100"])] == ["h100"]


def test_no_suggestion_sums_gradients_in_half_precision() -> None:
    found = search(workload(), site(), Budget(hours=1e5), devices=(DEVICES["4090"],), most_gpus=8, keep=50)
    assert any(plan.sharding.accumulation > 1 for plan in found.best)
    assert all(plan.sharding.stage > 0 or plan.sharding.accumulation == 1 for plan in found.best)


def test_what_was_measured_counts_for_its_own_device_only() -> None:
    plain = site("a100")
    slow = Stack("measured", efficiency=0.1)
    fast_memory = replace(plain.cluster.device, memory_bytes=10**12)
    measured = replace(plain, stack=slow, cluster=replace(plain.cluster, device=fast_memory))

    def best(place: Site, name: str) -> Plan:
        return search(workload(), place, Budget(hours=1e6), devices=(DEVICES[name],), most_gpus=8).best[0]

    assert best(measured, "h100").cost == best(plain, "h100").cost
    assert best(measured, "a100").cost.hours > 3 * best(plain, "a100").cost.hours
    assert best(measured, "a100").capacity_bytes == 10**12
