from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.data.plan import Plan, num_micro_batches, rank_slots


def plan_of(rows, *, seed=0, source="train", global_batch=8, lanes=None, window_rows=16):
    return Plan.single(rows, seed=seed, source=source, global_batch=global_batch, lanes=lanes, window_rows=window_rows)


def triples(planned):
    return list(zip(planned.epoch.tolist(), planned.block.tolist(), planned.row.tolist()))


def step_rows(plan, step):
    return triples(plan.slots(step, 0, plan.global_batch(0)))


@st.composite
def plans(draw):
    lanes = draw(st.integers(1, 6))
    global_batch = lanes * draw(st.integers(1, 5))
    rows = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12))
    assume(sum(rows) >= global_batch)
    settings = dict(seed=draw(st.integers(0, 2**40)), global_batch=global_batch, lanes=lanes)
    return plan_of(rows, window_rows=draw(st.integers(1, 20)), **settings)


# --- exactly once --------------------------------------------------------------------------------------------------


@given(plans(), st.integers(1, 4))
def test_every_kept_row_comes_once_an_epoch(plan, epochs):
    per_lane = plan.global_batch(0) // plan.lanes
    steps = -(-epochs * plan.orders[0].turns_per_epoch // per_lane)
    seen = Counter(row for step in range(steps) for row in step_rows(plan, step) if row[0] < epochs)
    assert set(seen.values()) == {1}
    for epoch in range(epochs):
        assert sum(1 for row in seen if row[0] == epoch) == plan.orders[0].rows_per_epoch
    assert all(0 <= row < plan.orders[0].rows_per_block[block] for _, block, row in seen)
    assert 0 <= plan.num_rows - plan.orders[0].rows_per_epoch < plan.lanes


@pytest.mark.parametrize("rows", [[10] * 10 + [7], [107]], ids=["many blocks", "one block"])
def test_the_rows_dropped_differ_from_epoch_to_epoch(rows):
    plan = plan_of(rows, global_batch=8, lanes=8)  # 107 rows in 8 lanes: 3 are left over
    everything = {(block, row) for block, count in enumerate(rows) for row in range(count)}
    dropped = [frozenset(everything - set(epoch_order(plan, epoch))) for epoch in range(20)]
    assert {len(left) for left in dropped} == {3}
    assert len(set(dropped)) > 15


def test_epochs_run_on_inside_a_step():
    plan = plan_of([7, 6], global_batch=4, lanes=2, window_rows=3)  # 6 rows a lane, 2 a step; then 13 rows in 4s
    assert [sorted({row[0] for row in step_rows(plan, step)}) for step in range(6)] == [[0], [0], [0], [1], [1], [1]]
    odd = plan_of([7, 6], global_batch=8, lanes=2, window_rows=3)  # 4 rows a lane and step: 6 is no multiple
    assert [sorted({row[0] for row in step_rows(odd, step)}) for step in range(3)] == [[0], [0, 1], [1]]


# --- independence --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(plans(), st.integers(0, 50))
def test_any_world_sees_the_same_global_batch(plan, step):
    whole = step_rows(plan, step)
    for size in range(1, 2 * plan.global_batch(0) + 1):
        bounds = [rank_slots(plan.global_batch(0), rank=rank, world_size=size) for rank in range(size)]
        joined = [row for first, last in bounds for row in triples(plan.slots(step, first, last))]
        assert joined == whole, size


@given(plans(), st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_step_does_not_depend_on_what_was_asked_before(plan, steps):
    asked_in_a_row = [step_rows(plan, step) for step in steps]
    for step, rows in zip(reversed(steps), reversed(asked_in_a_row)):
        order = plan.orders[0]
        fresh = plan_of(
            order.rows_per_block, seed=plan.seed, global_batch=plan.global_batch(0), lanes=plan.lanes,
            window_rows=order.window_rows,
        )  # fmt: skip
        assert step_rows(fresh, step) == rows


def test_steps_far_ahead_are_as_good_as_the_first():
    plan = plan_of([5, 3, 9], global_batch=4, lanes=2)
    rows = step_rows(plan, 10**12)
    assert {row[0] for row in rows} <= {10**12 * 2 // 8, 10**12 * 2 // 8 + 1}


# --- seeds ---------------------------------------------------------------------------------------------------------


def epoch_order(plan, epoch):
    per_epoch = plan.orders[0].rows_per_epoch // plan.global_batch(
        0
    )  # for plans where an epoch is a whole number of steps
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return tuple(row[1:] for step in steps for row in step_rows(plan, step))


def test_no_seed_and_epoch_share_an_order():
    orders = set()
    for seed in range(20):
        plan = plan_of([4] * 16, seed=seed, global_batch=16, lanes=8)  # 64 rows, 4 steps an epoch
        orders |= {epoch_order(plan, epoch) for epoch in range(20)}
    assert len(orders) == 400


def test_consecutive_epochs_are_unrelated():
    plan = plan_of([1] * 4096, global_batch=64, lanes=64, window_rows=64)
    orders = [[block for block, _ in epoch_order(plan, epoch)] for epoch in range(4)]
    assert np.abs(np.corrcoef(orders) - np.eye(4)).max() < 4 / np.sqrt(4096)


def test_sources_have_orders_of_their_own():
    rows = [3] * 40
    assert epoch_order(plan_of(rows, source="wiki"), 0) != epoch_order(plan_of(rows, source="books"), 0)


def test_batches_of_a_sorted_corpus_are_nearly_as_mixed_as_independent_draws():
    # Blocks stand for the place in the corpus; the bounds are the promises of docs/data-format.md's order.
    blocks, batch = 4096, 64
    plan = plan_of([16] * blocks, seed=5, global_batch=batch, lanes=64, window_rows=1024)
    steps = [plan.slots(step, 0, batch).block for step in range(plan.orders[0].turns_per_epoch)]
    distinct = np.mean([len(np.unique(step)) for step in steps])
    assert distinct >= 0.93 * blocks * (1 - (1 - 1 / blocks) ** batch)
    assert np.var([step.mean() for step in steps]) <= 1.15 * (blocks**2 / 12) / batch


def test_known_batches_never_change():
    # A change here needs a new PLAN_VERSION: it would give every running job another order.
    plan = plan_of([5, 3, 9, 4, 8, 6], seed=3, global_batch=8, lanes=4, window_rows=3)
    first, later = plan.slots(0, 0, 8), plan.slots(4, 0, 8)
    assert first.block.tolist() == [4, 4, 5, 5, 0, 2, 2, 2]
    assert first.row.tolist() == [7, 5, 3, 1, 3, 0, 8, 7]
    assert later.epoch.tolist() == [1] * 8
    assert later.block.tolist() == [2, 2, 0, 0, 4, 4, 5, 5]
    assert later.row.tolist() == [5, 4, 3, 2, 5, 7, 2, 1]
    assert plan.slots(1000, 6, 8).row.tolist() == [3, 2]


# --- settings ------------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"train\.global_batch: 8 rows are asked for.* has only 7"):
        plan_of([3, 4], global_batch=8)
    assert plan_of([4, 4], global_batch=8).orders[0].rows_per_epoch == 8


def test_an_empty_batch_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch: must be at least 1, got 0"):
        plan_of([3], global_batch=0)


def test_lanes_must_divide_the_batch_and_the_nearest_that_do_are_named():
    with pytest.raises(ConfigError, match=r"data\.lanes: 5 does not divide train\.global_batch=12; nearest: 4"):
        plan_of([100], global_batch=12, lanes=5)


@pytest.mark.parametrize(
    ("rows", "global_batch", "lanes"), [(10_000, 256, 64), (10_000, 96, 48), (10_000, 7, 7), (100, 32, 4), (20, 20, 1)]
)
def test_automatic_lanes_divide_the_batch_and_leave_rows_to_each(rows, global_batch, lanes):
    assert plan_of([rows], global_batch=global_batch).lanes == lanes


@given(st.integers(1, 500), st.integers(1, 600))
def test_ranks_share_the_slots_without_gap_and_evenly(global_batch, size):
    bounds = [rank_slots(global_batch, rank=rank, world_size=size) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == global_batch
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_micro_batches_are_as_few_as_the_fullest_rank_allows(global_batch, micro, size):
    count = num_micro_batches(global_batch, micro_batch=micro, world_size=size)
    bounds = [rank_slots(global_batch, rank=rank, world_size=size) for rank in range(size)]
    fullest = max(b - a for a, b in bounds)
    assert (count - 1) * micro < fullest <= count * micro
