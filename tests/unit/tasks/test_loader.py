import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.base.protocols import IGNORED_LABEL
from dstrain.base.world import World
from dstrain.tasks.encoded import EncodedExamples
from dstrain.tasks.loader import FILLER, ExampleLoader, evaluation_batches, ledger_digest, planned_examples


def make_examples(n, *, dtype=np.int64):
    """Example i is the token i repeated 1 to 6 times, label i modulo 3: identity can be read off a micro-batch."""
    lengths = [1 + i * 7 % 6 for i in range(n)]
    return EncodedExamples(
        tokens=np.repeat(np.arange(n), lengths).astype(np.int32),
        token_types=np.repeat(np.arange(n) % 2, lengths).astype(np.int32),
        ends=np.cumsum(lengths, dtype=np.int64),
        labels=(np.arange(n) % 3).astype(dtype),
    )


def loaders(n, *, world_size, global_batch=4, micro_batch=2, seed=1, pads=True):
    return [
        ExampleLoader(
            make_examples(n),
            seed=seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            world=World(rank=r, size=world_size),
            pads=pads,
        )
        for r in range(world_size)
    ]


def seen(step_data):
    """Examples in the counting segments of a rank's step, read off the tokens."""
    found = []
    for batch in step_data.micro_batches:
        starts = np.cumsum([0, *batch.lengths[:-1]])
        if batch.num_targets:
            found += batch.tokens.numpy()[starts].tolist()
    return found


sizes = {"n": st.integers(1, 23), "global_batch": st.integers(1, 13), "world_size": st.integers(1, 6)}


@settings(max_examples=60, deadline=None)
@given(**sizes, micro_batch=st.integers(1, 5))
def test_every_example_trains_exactly_once_per_epoch_at_any_world_and_batch(n, global_batch, world_size, micro_batch):
    ranks = loaders(n, world_size=world_size, global_batch=global_batch, micro_batch=micro_batch)
    steps = -(-3 * n // global_batch)
    order = []
    for step in range(steps):
        data = [rank.step(step) for rank in ranks]
        slots = [rank.examples_of(step) for rank in ranks]
        in_slot_order = np.concatenate([s.example for s in slots]).tolist()
        assert sorted(itertools.chain.from_iterable(map(seen, data))) == sorted(in_slot_order)
        assert sum(d.num_rows for d in data) == global_batch
        order += in_slot_order
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(**sizes, step=st.integers(0, 10**9))
def test_the_ranks_together_see_the_batch_and_the_ledger_of_one_rank(n, global_batch, world_size, step):
    [alone] = loaders(n, world_size=1, global_batch=global_batch)
    ranks = loaders(n, world_size=world_size, global_batch=global_batch)
    joined = np.concatenate([rank.examples_of(step).example for rank in ranks])
    assert joined.tolist() == alone.examples_of(step).example.tolist()
    ledger = sum(rank.step(step).ledger for rank in ranks) % (1 << 63)
    assert ledger == alone.step(step).ledger
    assert len({rank.step(step).epoch for rank in ranks}) == 1


@settings(max_examples=40, deadline=None)
@given(**sizes, micro_batch=st.integers(1, 5), step=st.integers(0, 50))
def test_all_ranks_make_the_same_number_of_micro_batches_none_too_large(n, global_batch, world_size, micro_batch, step):
    expected = math.ceil(math.ceil(global_batch / world_size) / micro_batch)
    for rank in loaders(n, world_size=world_size, global_batch=global_batch, micro_batch=micro_batch):
        batches = rank.step(step).micro_batches
        assert len(batches) == expected
        assert all(len(b.lengths) <= micro_batch for b in batches)


def test_a_micro_batch_keeps_the_protocols_promises():
    [loader] = loaders(20, world_size=1, global_batch=8, micro_batch=4)
    data = loader.step(3)
    for batch in data.micro_batches:
        assert list(batch.lengths) == sorted(batch.lengths, reverse=True)
        assert len(batch.tokens) == len(batch.positions) == len(batch.token_types) == sum(batch.lengths)
        assert batch.num_tokens == sum(batch.lengths)
        assert batch.num_targets == len(batch.lengths) == len(batch.labels)
        assert batch.targets.tolist() == list(range(len(batch.lengths)))
        starts = np.cumsum([0, *batch.lengths[:-1]])
        assert batch.positions.numpy()[starts].tolist() == [0] * len(starts)
        identity = batch.tokens.numpy()[starts]
        assert batch.labels.tolist() == (identity % 3).tolist()
        assert batch.token_types.tolist() == (batch.tokens % 2).tolist()
    assert data.padded_tokens == sum(len(b.lengths) * b.lengths[0] for b in data.micro_batches)


def test_padding_is_counted_only_where_the_model_is_fed_padded_rows():
    [padded] = loaders(20, world_size=1, global_batch=8, micro_batch=4)
    [unpadded] = loaders(20, world_size=1, global_batch=8, micro_batch=4, pads=False)
    tokens = sum(b.num_tokens for b in unpadded.step(3).micro_batches)
    assert unpadded.step(3).padded_tokens == tokens < padded.step(3).padded_tokens


def test_micro_batches_of_a_step_hold_similar_lengths():
    [loader] = loaders(20, world_size=1, global_batch=12, micro_batch=3)
    lengths = [length for batch in loader.step(0).micro_batches for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_a_rank_without_examples_gets_filler_that_counts_for_nothing(dtype):
    loader = ExampleLoader(
        make_examples(5, dtype=dtype), seed=1, global_batch=1, micro_batch=1, world=World(rank=0, size=2)
    )
    data = loader.step(0)
    [batch] = data.micro_batches
    assert (data.num_rows, data.padded_tokens, data.ledger) == (0, 0, 0)
    assert (batch.num_targets, batch.num_tokens) == (0, 0)
    assert batch.labels.tolist() == [IGNORED_LABEL]
    assert batch.labels.numpy().dtype == dtype
    assert batch.lengths == (len(batch.tokens),)


def test_a_step_is_the_same_whenever_it_is_asked_for():
    [loader] = loaders(11, world_size=1)
    later = loader.step(7)
    loader.step(0)
    again = loader.step(7)
    assert [b.tokens.tolist() for b in later.micro_batches] == [b.tokens.tolist() for b in again.micro_batches]
    assert later.ledger == again.ledger


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return planned_examples(epoch, 0, 50, num_examples=50, global_batch=50, seed=seed).example.tolist()

    orders = [order(1, 0), order(1, 1), order(2, 0), order(2, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_the_ledger_tells_another_step_epoch_or_example_apart():
    planned = planned_examples(0, 0, 4, num_examples=50, global_batch=4, seed=1)
    other_epoch = planned_examples(50, 0, 4, num_examples=50, global_batch=4, seed=1)
    assert (
        len({ledger_digest(planned, step=0), ledger_digest(planned, step=1), ledger_digest(other_epoch, step=0)}) == 3
    )


def test_the_epoch_runs_on_with_the_steps():
    [loader] = loaders(10, world_size=1, global_batch=4)
    assert loader.steps_per_epoch == 2.5
    assert [loader.step(s).epoch for s in (0, 4)] == [0.4, 2.0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_state_fits_another_world_size(world_size):
    state = loaders(10, world_size=1)[0].state_dict()
    loaders(10, world_size=world_size)[-1].restore(state, step=5)


@pytest.mark.parametrize(
    ("change", "key"), [({"seed": 2}, "seed"), ({"global_batch": 5}, "global_batch"), ({"n": 11}, "fingerprint")]
)
def test_a_state_of_other_data_order_or_batch_is_refused_with_the_difference(change, key):
    state = loaders(10, world_size=1)[0].state_dict()
    n = change.pop("n", 10)
    [other] = loaders(n, world_size=1, **change)
    with pytest.raises(CheckpointError, match=key):
        other.restore(state, step=5)


@pytest.mark.parametrize("name", ["global_batch", "micro_batch"])
def test_a_batch_below_1_is_refused(name):
    with pytest.raises(ConfigError, match=f"train.{name}"):
        loaders(5, world_size=1, **{name: 0})


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 23), world_size=st.integers(1, 6), micro_batch=st.integers(1, 5))
def test_evaluation_sees_every_example_once_and_keeps_ranks_in_step(n, world_size, micro_batch):
    examples = make_examples(n)
    shares = [
        evaluation_batches(examples, world=World(rank=r, size=world_size), micro_batch=micro_batch)
        for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    found = []
    for item in itertools.chain.from_iterable(shares):
        assert len(item.indices) == len(item.batch.lengths) <= micro_batch
        if item.indices[0] == FILLER:
            assert item.batch.num_targets == 0
            continue
        starts = np.cumsum([0, *item.batch.lengths[:-1]])
        assert item.batch.tokens.numpy()[starts].tolist() == item.indices.tolist()
        found += item.indices.tolist()
    assert sorted(found) == list(range(n))


# --- windows stepped over at run time ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_window_stepped_over_takes_its_examples_out_of_the_order(world_size):
    ranks, [plain] = loaders(23, world_size=world_size), loaders(23, world_size=1)
    for loader in ranks:
        loader.skip_window(2, 5, from_step=1)
        assert loader.phase_of(7) == 0
    for step in range(9):
        expected = plain.step(step if step < 2 else step + 3)
        together = sorted(example for loader in ranks for example in seen(loader.step(step)))
        assert together == sorted(seen(expected)) == sorted(row for _, _, row in ranks[0].rows_of(step))
        assert {loader.step(step).epoch for loader in ranks} == {expected.epoch}


def test_windows_are_restored_with_the_state():
    [loader], [other] = loaders(23, world_size=1), loaders(23, world_size=1)
    loader.skip_window(2, 5, from_step=1)
    loader.skip_window(1, 3, from_step=1)
    other.restore(loader.state_dict(), step=4)
    assert [other.rows_of(step) for step in range(12)] == [loader.rows_of(step) for step in range(12)]
    older = {key: value for key, value in loader.state_dict().items() if key != "stepped_over"}
    other.restore(older, step=4)
    assert other.rows_of(3) == loaders(23, world_size=1)[0].rows_of(3)


def test_no_window_may_change_what_was_done():
    [loader] = loaders(23, world_size=1)
    with pytest.raises(ValueError, match="no window"):
        loader.skip_window(2, 5, from_step=3)
