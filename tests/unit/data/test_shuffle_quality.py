"""How well the plan mixes a corpus sorted by origin, and how unlike each other its orders are (no data, the plan alone)."""

import numpy as np
import pytest
from scipy.stats import chi2

from dstrain.base.seeds import derive
from dstrain.data.plan import Plan

ROWS_PER_BLOCK = 128


def plan_of(num_blocks, *, lanes=64, window_blocks=64, global_batch=512, seed=0):
    return Plan.single(
        np.full(num_blocks, ROWS_PER_BLOCK), seed=seed, source="train", global_batch=global_batch,
        lanes=lanes, window_rows=window_blocks * ROWS_PER_BLOCK,
    )  # fmt: skip


def rows_of(plan, steps):
    """(steps, global_batch) numbers of the rows, in stored order."""
    rows = [plan.slots(step, 0, plan.global_batch(step)) for step in steps]
    return np.stack([r.block * ROWS_PER_BLOCK + r.row for r in rows])


def position_in_epoch(plan):
    """(R,) where in the epoch each row comes, and which rows come at all."""
    turns = plan.orders[0].rows_per_epoch // plan.global_batch(0)
    order = rows_of(plan, range(turns)).ravel()
    position = np.full(plan.num_rows, -1)
    position[order] = np.arange(len(order))
    return position


# --- a corpus of 2,000 shards of 1,000 rows, one origin each, sorted: the worst case --------------------------------

SHARDS, SHARD_ROWS, BATCH = 2000, 1000, 512


@pytest.fixture(scope="module", params=[0, 1])
def shards_of_batches(request):
    """(steps, BATCH) shard of each row, over one epoch; a reach of 64 lanes x 64 blocks x 128 rows."""
    plan = plan_of(SHARDS * SHARD_ROWS // ROWS_PER_BLOCK, seed=request.param)
    steps = plan.orders[0].rows_per_epoch // BATCH
    return rows_of(plan, range(0, steps, 10)) // SHARD_ROWS


def test_batches_of_a_sorted_corpus_vary_like_independent_ones(shards_of_batches):
    """Variance inflation: variance of the batch means of an origin's property, over that of independent draws."""
    inflation = []
    for seed in range(20):  # a value for each origin
        value = np.random.default_rng(seed).standard_normal(SHARDS)[shards_of_batches]
        inflation.append(value.mean(axis=1).var() / (value.var() / BATCH))
    assert np.mean(inflation) <= 1.15


def test_a_batch_holds_nearly_as_many_origins_as_independent_draws(shards_of_batches):
    distinct = np.mean([len(np.unique(batch)) for batch in shards_of_batches])
    independent = SHARDS * (1 - (1 - 1 / SHARDS) ** BATCH)
    assert distinct / independent >= 0.93


def test_a_plan_without_lanes_would_fail_both_measures():
    plan = plan_of(SHARDS * SHARD_ROWS // ROWS_PER_BLOCK, lanes=1, window_blocks=1)
    shards = rows_of(plan, range(0, 3000, 60)) // SHARD_ROWS
    value = np.random.default_rng(0).standard_normal(SHARDS)[shards]
    assert value.mean(axis=1).var() / (value.var() / BATCH) > 10
    assert np.mean([len(np.unique(batch)) for batch in shards]) < 20


# --- where in the epoch a row comes ----------------------------------------------------------------------------------


def test_rows_of_any_stored_place_come_at_any_time():
    """Chi-square of (tenth of the stored corpus) x (tenth of the epoch), each lane of ten blocks in one window."""
    parts, seeds = 10, 12
    counts = np.zeros((parts, parts))
    for seed in range(seeds):
        position = position_in_epoch(plan_of(640, seed=seed))
        kept = np.flatnonzero(position >= 0)
        np.add.at(counts, (kept * parts // (640 * ROWS_PER_BLOCK), position[kept] * parts // len(kept)), 1)
    expected = counts.sum() / parts**2
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Each row comes once and each time holds one row, so the cells vary a little less than independent draws would.
    assert statistic < chi2.ppf(0.999, (parts - 1) ** 2)


def test_every_slot_of_a_batch_draws_from_the_whole_corpus_over_the_seeds():
    """Chi-square of the tenth of the corpus that slot 0 of step 0 holds, over seeds."""
    first = [int(rows_of(plan_of(100, lanes=8, global_batch=64, seed=seed), [0])[0, 0]) for seed in range(300)]
    counts = np.bincount(np.array(first) * 10 // (100 * ROWS_PER_BLOCK), minlength=10)
    statistic = float(((counts - 30) ** 2 / 30).sum())
    assert statistic < chi2.ppf(0.999, 9)


# --- seeds and epochs --------------------------------------------------------------------------------------------------


def epoch_position(plan, epoch):
    per_epoch = plan.orders[0].turns_per_epoch * plan.lanes // plan.global_batch(0)
    order = rows_of(plan, range(epoch * per_epoch, (epoch + 1) * per_epoch)).ravel()
    position = np.empty(plan.num_rows)
    position[order] = np.arange(len(order))
    return position


def block_correlation(first, second):
    """Correlation of blocks' mean positions: the rows of a block come close together, so blocks are what is drawn."""
    a, b = (p.reshape(-1, ROWS_PER_BLOCK).mean(axis=1) for p in (first, second))
    return float(np.corrcoef(a, b)[0, 1])


NUM_BLOCKS = 2048  # with 8 lanes of 256 blocks in windows of 16: every epoch is whole


@pytest.mark.parametrize("pair", [("epochs", 0, 1), ("epochs", 1, 2), ("seeds", 0, 1), ("seeds", 1, 2)], ids=str)
def test_orders_of_consecutive_epochs_and_seeds_are_uncorrelated(pair):
    kind, first, second = pair
    positions = [
        epoch_position(
            plan_of(NUM_BLOCKS, lanes=8, window_blocks=16, global_batch=64, seed=n if kind == "seeds" else 0),
            n if kind == "epochs" else 0,
        )
        for n in (first, second)
    ]
    assert abs(block_correlation(*positions)) < 5 / np.sqrt(NUM_BLOCKS)
    assert abs(np.corrcoef(*positions)[0, 1]) < 5 / np.sqrt(NUM_BLOCKS)


def test_keys_of_seeds_and_epochs_never_collide():
    keys = {derive(seed, "plan.blocks", "train", epoch) for seed in range(1000) for epoch in range(100)}
    assert len(keys) == 100_000


def test_an_epoch_of_one_seed_is_no_epoch_of_another():
    """seed + epoch as a key would make seed 1's epoch 1 seed 2's epoch 0."""
    orders = {}
    for seed in range(6):
        plan = plan_of(64, lanes=8, global_batch=64, seed=seed)
        per_epoch = plan.orders[0].rows_per_epoch // 64
        for epoch in range(6):
            orders[seed, epoch] = rows_of(plan, range(epoch * per_epoch, epoch * per_epoch + 2)).tobytes()
    assert len(set(orders.values())) == 36
