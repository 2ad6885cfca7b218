import dataclasses
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import CheckpointError
from dstrain.base.protocols import IGNORED_LABEL, Corrupted
from dstrain.base.world import World
from dstrain.data.config import DataConfig
from dstrain.data.evaluation import evaluation_batches
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.data.loader import PackedLoader
from dstrain.data.micro_batch import make_micro_batch, split_evenly
from dstrain.data.plan_spec import plan_spec
from dstrain.data.reader import ShardDataset
from dstrain.data.row_index import rows_per_block
from dstrain.data.rows import RowSource
from dstrain.data.shard_writer import ShardWriter

VOCAB, PREFIX, SUFFIX = 200, 2, 3
S = 32


@pytest.fixture(scope="module")
def documents():
    """Lengths from 1 token to several rows; ids from 5 on."""
    rng = np.random.default_rng(7)
    return [rng.integers(5, VOCAB, size=int(n)).astype(np.uint16) for n in [1, 30, 31, 100, *rng.integers(2, 40, 90)]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, documents):
    identity = {
        "tokenizer_sha256": "0" * 64, "vocab_size": VOCAB, "dtype": "uint16", "frame_prefix": [PREFIX],
        "frame_suffix": [SUFFIX], "special_ids": [0, 1, 2, 3, 4],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("dataset")
    writer = ShardWriter(folder, identity=identity, block_tokens=256, shard_bytes=8192)
    for document in documents:
        writer.add(document)
    writer.finish(provenance={})
    return ShardDataset(folder)


def corrupt(pieces, step=0):
    """Hides a third of the tokens by their document and position; some pieces get none."""
    targets = np.flatnonzero(((pieces.uid + pieces.position + pieces.epoch) % 3 == 0) & ~pieces.frame)
    tokens = pieces.tokens.astype(np.int64)
    labels = tokens[targets]
    tokens[targets] = 4
    return Corrupted(tokens=tokens, targets=targets, labels=labels)


def source_of(dataset, *, cache_bytes=1 << 20, words=None):
    return RowSource(dataset, sequence_length=S, word_starts=words, cache_bytes=cache_bytes)


def rows_of(dataset):
    return rows_per_block(
        dataset, num_blocks=len(dataset.blocks), fingerprint="", sequence_length=S, frame_length=2, may_write=False
    )


def loader_of(dataset, *, rank=0, size=1, micro=4, global_batch=12, lanes=4, corrupt=corrupt, **plan):
    sources = {name: source_of(d) for name, d in (dataset if isinstance(dataset, dict) else {"train": dataset}).items()}
    more = {key: plan.pop(key) for key in ("damage", "damage_allowance") if key in plan}
    seed = plan.pop("seed", 3)
    config = DataConfig.model_validate({"path": "x", "window_rows": 8, "sequence_length": S, "lanes": lanes} | plan)
    rows = {name: rows_of(source.dataset) for name, source in sources.items()}
    return PackedLoader(
        sources,
        plan_spec(config, rows, global_batch=global_batch, seed=seed),
        corrupt,
        corruption="thirds",
        world=World(rank=rank, size=size),
        micro_batch=micro,
        **more,
    )


def segments(batch):
    """The segments of a micro-batch, each with what is to be predicted in it."""
    ends = np.cumsum(batch.lengths)
    owner = np.searchsorted(ends, batch.targets.numpy(), side="right")
    found = []
    for number, (end, length) in enumerate(zip(ends.tolist(), batch.lengths)):
        mine = (owner == number) & (batch.labels.numpy() != IGNORED_LABEL)
        where = (batch.targets.numpy()[mine] - (end - length)).tolist()
        found.append(
            (tuple(batch.tokens[end - length : end].tolist()), tuple(where), tuple(batch.labels.numpy()[mine].tolist()))
        )
    return found


def same(one, other):
    """Whether two steps hold the same bytes."""
    fields = [f.name for f in dataclasses.fields(one) if f.name != "micro_batches"]
    if any(getattr(one, name) != getattr(other, name) for name in fields):
        return False
    if len(one.micro_batches) != len(other.micro_batches):
        return False
    for a, b in zip(one.micro_batches, other.micro_batches):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            equal = torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
            if not equal:
                return False
    return True


# --- what a step holds ---------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_document_whole_and_once(dataset, documents):
    loader = loader_of(dataset, global_batch=1, lanes=1, corrupt=untouched)
    rows = int(rows_of(dataset).sum())
    shown = Counter()
    for step in range(rows):
        for batch in loader.step(step).micro_batches:
            for tokens, _, _ in segments(batch):
                assert (tokens[0], tokens[-1]) == (PREFIX, SUFFIX)
                shown[tokens[1:-1]] += 1
    capacity = S - 2
    expected = Counter(
        tuple(document[start : start + capacity].tolist())
        for document in documents
        for start in range(0, len(document), capacity)
    )
    assert shown == expected
    assert loader.steps_per_epoch == rows


def untouched(pieces, step=0):
    none = np.zeros(0, dtype=np.int64)
    return Corrupted(tokens=pieces.tokens.astype(np.int64), targets=none, labels=none)


def test_a_micro_batch_keeps_what_its_fields_promise(dataset):
    data = loader_of(dataset).step(5)
    assert data.num_rows == 12
    assert data.padded_tokens == 12 * S
    assert data.epoch == pytest.approx(6 * 12 / (rows_of(dataset).sum() // 4 * 4))
    assert len(data.micro_batches) == 3
    for batch in data.micro_batches:
        assert list(batch.lengths) == sorted(batch.lengths, reverse=True)
        assert sum(batch.lengths) == len(batch.tokens) == batch.num_tokens
        assert batch.num_targets == len(batch.targets) == len(batch.labels)
        assert batch.targets.diff().min() > 0
        assert (batch.tokens[batch.targets] == 4).all()
        assert batch.positions.tolist() == [i for length in batch.lengths for i in range(length)]
        assert {t.dtype for t in (batch.tokens, batch.positions, batch.targets, batch.labels)} == {torch.int64}


def test_asking_twice_and_out_of_order_gives_the_same_bytes(dataset):
    loader = loader_of(dataset)
    forward = [loader.step(step) for step in range(12)]
    fresh = loader_of(dataset)
    for step in (11, 3, 3, 0, 7):
        assert same(fresh.step(step), forward[step])
    assert not same(forward[3], forward[4])


def test_a_tiny_cache_changes_nothing_and_stays_tiny(dataset):
    plan = [(epoch, block, 0) for epoch in range(2) for block in (0, 3, 1, 3, 2, 0)]
    large, small = source_of(dataset), source_of(dataset, cache_bytes=1)
    for rows in (plan, plan[:3], plan[::-1]):
        one, other = large.pieces(rows), small.pieces(rows)
        assert one[1] == other[1]
        np.testing.assert_array_equal(one[0].tokens, other[0].tokens)
    assert len(small._cache) == 1


def test_a_block_in_the_cache_is_not_read_again(dataset, monkeypatch):
    reads = []
    real = ShardDataset.read
    monkeypatch.setattr(ShardDataset, "read", lambda self, block: (reads.append(block), real(self, block))[1])
    source = source_of(dataset)
    for _ in range(3):
        source.pieces([(0, 0, 0), (0, 1, 0), (0, 0, 1)])
    assert reads == [0, 1]


def test_threads_may_share_a_loader(dataset):
    expected = [loader_of(dataset).step(step) for step in range(16)]
    loader = loader_of(dataset)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(loader.step, range(16)))
    assert all(same(a, b) for a, b in zip(found, expected))


# --- worlds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 7, 12, 17])
def test_ranks_together_train_on_what_one_rank_would(size, dataset):
    for step in (0, 4, 9):
        whole = loader_of(dataset).step(step)
        parts = [loader_of(dataset, rank=rank, size=size).step(step) for rank in range(size)]
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert sum(part.num_rows for part in parts) == whole.num_rows
        assert sum(part.padded_tokens for part in parts) == whole.padded_tokens
        assert sum(part.ledger for part in parts) % LEDGER_MODULUS == whole.ledger
        expected = Counter(s for batch in whole.micro_batches for s in segments(batch))
        real = [batch for part in parts for batch in part.micro_batches if batch.num_tokens]
        assert Counter(s for batch in real for s in segments(batch)) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12])
def test_rows_keep_their_order_over_ranks_and_micro_batches(size, dataset):
    # With one row a micro-batch nothing is reordered, so the joined sequence itself must be that of one rank.
    whole = [segments(batch) for batch in loader_of(dataset, micro=1).step(2).micro_batches]
    parts = [loader_of(dataset, rank=rank, size=size, micro=1).step(2) for rank in range(size)]
    assert [segments(b) for part in parts for b in part.micro_batches if b.num_tokens] == whole


def test_a_rank_without_rows_gets_fillers_that_weigh_nothing(dataset):
    empty = loader_of(dataset, rank=0, size=20).step(0)
    assert (empty.num_rows, empty.padded_tokens, empty.ledger) == (0, 0, 0)
    [batch] = empty.micro_batches
    assert (batch.num_targets, batch.num_tokens) == (0, 0)
    assert batch.labels.tolist() == [IGNORED_LABEL]
    assert batch.tokens.tolist() == [PREFIX, SUFFIX]
    assert (batch.lengths, batch.positions.tolist(), batch.targets.tolist()) == ((2,), [0, 1], [0])


def test_a_micro_batch_where_nothing_was_hidden_scores_one_ignored_token(dataset):
    batch, digest = make_micro_batch([source_of(dataset)], [(0, 0, 0, 0)], untouched, step=0)
    assert (batch.num_targets, batch.targets.tolist(), batch.labels.tolist()) == (0, [0], [IGNORED_LABEL])
    assert batch.num_tokens > 0
    assert digest != 0


# --- the ledger ----------------------------------------------------------------------------------------------------


def test_the_ledger_tells_rows_epochs_steps_and_masks_apart(dataset):
    source = source_of(dataset)

    def digest(rows, *, step=0, corruption=corrupt):
        return make_micro_batch([source], [(0, *row) for row in rows], corruption, step=step)[1]

    rows = [(0, 0, 0), (0, 1, 2)]
    variants = [
        digest(rows), digest(rows, step=1), digest([(0, 0, 0), (0, 1, 1)]), digest([(1, 0, 0), (0, 1, 2)]),
        digest(rows, corruption=untouched), digest(rows[:1]), digest([*rows, rows[0]]),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert all(0 <= value < LEDGER_MODULUS for value in variants)
    assert digest(rows) == digest(rows[::-1]) == (digest(rows[:1]) + digest(rows[1:])) % LEDGER_MODULUS


def test_a_steps_ledger_is_the_sum_over_its_micro_batches(dataset):
    loader, plan = loader_of(dataset), loader_of(dataset).plan
    planned = plan.slots(4, 0, 12)
    rows = [(0, *row) for row in zip(planned.epoch.tolist(), planned.block.tolist(), planned.row.tolist())]
    expected = make_micro_batch([source_of(dataset)], rows, corrupt, step=4)[1]
    assert loader.step(4).ledger == expected != 0


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [None, 1, 10, 10_000])
def test_an_evaluation_is_the_same_at_every_world_size(max_rows, dataset):
    def share(rank, size):
        world = World(rank=rank, size=size)
        settings = dict(world=world, micro_batch=4, max_rows=max_rows)
        return evaluation_batches(source_of(dataset), rows_of(dataset), corrupt, **settings)

    alone = share(0, 1)
    expected = Counter(s for batch in alone for s in segments(batch))
    for size in (2, 3, 8, 25):
        shares = [share(rank, size) for rank in range(size)]
        assert len({len(batches) for batches in shares}) == 1
        batches = [batch for batches in shares for batch in batches]
        assert sum(b.num_targets for b in batches) == sum(b.num_targets for b in alone)
        assert Counter(s for b in batches if b.num_tokens for s in segments(b)) == expected


def test_a_short_evaluation_is_spread_over_the_whole_split(dataset):
    settings = dict(world=World(), micro_batch=100, max_rows=10)
    [batch] = evaluation_batches(source_of(dataset), rows_of(dataset), corrupt, **settings)
    counts = rows_of(dataset)
    ends = np.cumsum(counts)
    rows = [int(i * ends[-1] // 10) for i in range(10)]
    blocks = [int(np.searchsorted(ends, row, side="right")) for row in rows]
    expected = [(0, 0, block, row - int(ends[block] - counts[block])) for row, block in zip(rows, blocks)]
    assert len(set(blocks)) > 5
    assert segments(batch) == segments(make_micro_batch([source_of(dataset)], expected, corrupt, step=0)[0])


# --- state ---------------------------------------------------------------------------------------------------------


def test_the_state_of_the_same_run_is_accepted_on_other_ranks(dataset):
    state = json.loads(json.dumps(loader_of(dataset).state_dict()))
    loader_of(dataset, rank=2, size=3, micro=1).restore(state, step=5)
    assert len(json.dumps(state)) < 1024


@pytest.mark.parametrize(
    ("change", "key", "then", "now"),
    [
        ({"seed": 4}, "seed", "3", "4"),
        ({"global_batch": 8}, "global_batch", "12", "8"),
        ({"lanes": 2}, "lanes", "4", "2"),
        ({"window_rows": 9}, "window_rows", "8", "9"),
        ({"tail": "exact"}, "tail", "'rotate'", "'exact'"),
    ],
)
def test_another_order_is_refused_with_the_value_then_and_now(change, key, then, now, dataset):
    state = loader_of(dataset).state_dict()
    with pytest.raises(CheckpointError, match=f"{key}: {then} in the checkpoint, {now} now") as caught:
        loader_of(dataset, **change).restore(state, step=5)
    assert str(caught.value).count("in the checkpoint") == 1


@pytest.mark.parametrize(
    "key",
    [
        "fingerprints",
        "sequence_length",
        "corruption",
        "order_version",
        "plan_version",
        "packer_version",
        "ledger_version",
        "kind",
    ],
)
def test_every_key_of_the_state_is_compared(key, dataset):
    loader = loader_of(dataset)
    with pytest.raises(CheckpointError, match=f"{key}: 'other' in the checkpoint"):
        loader.restore(loader.state_dict() | {key: "other"}, step=5)
    missing = {name: value for name, value in loader.state_dict().items() if name != key}
    with pytest.raises(CheckpointError, match=f"{key}: None in the checkpoint"):
        loader.restore(missing, step=5)


# --- windows stepped over at run time ------------------------------------------------------------------------------


def order(loader, first, last):
    return [loader.rows_of(step) for step in range(first, last)]


def test_a_window_stepped_over_at_run_time_takes_its_steps_out_of_the_order(dataset):
    plain, skipping = loader_of(dataset), loader_of(dataset)
    before = [skipping.step(step) for step in range(8)]
    skipping.skip_window(3, 5, from_step=2)
    assert order(skipping, 0, 4) == order(plain, 0, 3) + order(plain, 5, 6)
    done = [dataclasses.replace(skipping.step(step), epoch=before[step].epoch) for step in range(3)]
    assert all(map(same, done, before)), "what was done stays as it was, but for the epoch told at the edge"
    assert skipping.step(3).ledger != before[3].ledger


def test_what_was_stepped_over_is_never_trained_on_in_any_epoch(dataset):
    loader = loader_of(dataset)
    gone = {row for rows in order(loader, 2, 4) for row in rows}
    epochs = 3
    loader.skip_window(2, 4, from_step=2)
    counts = Counter(row for rows in order(loader, 0, int(loader.steps_per_epoch * epochs) - 2) for row in rows)
    assert gone
    assert not gone & counts.keys()
    assert max(counts.values()) <= epochs


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_together_step_over_the_same_window(size, dataset):
    alone, ranks = loader_of(dataset), [loader_of(dataset, rank=r, size=size) for r in range(size)]
    for loader in (alone, *ranks):
        loader.skip_window(1, 4, from_step=0)
    for step in range(6):
        ledgers = [loader.step(step).ledger for loader in ranks]
        assert sum(ledgers) % LEDGER_MODULUS == alone.step(step).ledger
        assert all(loader.rows_of(step) == alone.rows_of(step) for loader in ranks)


def test_windows_are_part_of_the_state_and_restored_with_it(dataset):
    loader = loader_of(dataset)
    loader.skip_window(3, 5, from_step=0)
    loader.skip_window(2, 4, from_step=0)
    state = json.loads(json.dumps(loader.state_dict()))
    other = loader_of(dataset, rank=1, size=2)
    assert other.restore(state, step=6) is None
    assert order(other, 0, 12) == order(loader, 0, 12)
    assert other.state_dict() == loader.state_dict()
    assert loader_of(dataset).restore(loader_of(dataset).state_dict(), step=6) is None
    older = {key: value for key, value in state.items() if key != "stepped_over"}
    other.restore(older, step=6)
    assert order(other, 0, 6) == order(loader_of(dataset), 0, 6), "a checkpoint of before that has no windows"


def test_windows_of_the_configuration_keep_their_steps_and_are_still_compared(dataset):
    configured = loader_of(dataset, skip_steps=[(6, 7)])
    configured.skip_window(2, 4, from_step=1)
    assert configured.spec.skip_steps == ((2, 4), (6, 7))
    state = configured.state_dict()
    assert state["skip_steps"] == [[6, 7]]
    with pytest.raises(CheckpointError, match="skip_steps"):
        loader_of(dataset).restore(state, step=8)
    loader_of(dataset, skip_steps=[(6, 7)]).restore(state, step=8)


def test_a_window_over_a_change_of_the_batch_is_counted_in_the_steps_it_begins_in(dataset):
    loader = loader_of(dataset, phases=[{"from_step": 4, "global_batch": 24}])
    assert [loader.phase_of(step) for step in (0, 3, 4, 9)] == [0, 0, 1, 1]
    loader.skip_window(3, 5, from_step=0)
    assert loader.stepped_over == ((3, 6),), "12 + 24 rows are three steps of 12"


@pytest.mark.parametrize(("first", "last", "from_step"), [(3, 3, 0), (4, 3, 0), (2, 5, 3)])
def test_no_window_may_change_what_was_done(first, last, from_step, dataset):
    with pytest.raises(ValueError, match="no window"):
        loader_of(dataset).skip_window(first, last, from_step=from_step)


def test_rows_of_a_step_are_what_all_ranks_train_on_without_those_that_are_gone(dataset):
    loader = loader_of(dataset, rank=1, size=2, damage="mask", damage_allowance=1.0)
    rows = loader.rows_of(0)
    assert len(rows) == 12
    source, block, _ = rows[0]
    loader.close_blocks([(source, block)], from_step=0)
    assert loader.rows_of(0) == [row for row in rows if row[1] != block]


# --- small parts ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(), max_size=50), st.integers(1, 20))
def test_an_even_split_loses_nothing_and_differs_by_at_most_one(rows, parts):
    split = split_evenly(rows, parts)
    assert [row for part in split for row in part] == rows
    assert len(split) == parts
    assert max(map(len, split)) - min(map(len, split)) <= 1
