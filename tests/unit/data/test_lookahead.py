from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.lookahead import Lookahead


class Told:
    """A dataset that keeps what it was told last."""

    def __init__(self):
        self.blocks, self.told, self.ever = [], 0, set()

    def will_need(self, blocks):
        self.blocks, self.told = list(blocks), self.told + 1
        self.ever |= set(blocks)


def uses(step):
    """Two sources; blocks come back after a while, as they do while a window of rows is read."""
    return [(0, step // 3), (1, step % 5), (0, step // 3 + step % 2)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(1, 400))
def test_the_next_blocks_are_named_in_order_of_use_within_the_budget(strides, limit):
    datasets = [Told(), Told()]
    ahead = Lookahead(datasets, blocks_of=uses, block_bytes=lambda source, block: 10, limit_bytes=limit)
    step = told_at = 0
    for stride in strides:
        step += stride
        before = [dataset.told for dataset in datasets]
        ahead.at(step)
        told_at = step if [dataset.told for dataset in datasets] != before else told_at
        for source, dataset in enumerate(datasets):
            coming = list(
                dict.fromkeys(b for later in range(told_at, told_at + 200) for s, b in uses(later) if s == source)
            )
            told = [block for block in dataset.blocks if block in coming]
            assert told == [block for block in coming if block in told]  # soonest first
        assert all(block in datasets[source].ever for source, block in uses(step))
        assert sum(len(dataset.blocks) for dataset in datasets) * 10 < limit + 50


def test_nothing_beyond_the_last_step_is_named():
    dataset = Told()
    ahead = Lookahead([dataset], blocks_of=lambda s: [(0, s)], block_bytes=lambda *_: 1, limit_bytes=1000, last_step=7)
    ahead.at(4)
    assert dataset.blocks == [4, 5, 6]
    ahead.at(6)
    assert dataset.blocks == [6]


def test_a_seek_starts_over_where_it_lands():
    dataset = Told()
    ahead = Lookahead([dataset], blocks_of=lambda s: [(0, s)], block_bytes=lambda *_: 1, limit_bytes=5)
    ahead.at(0)
    ahead.at(10_000)
    assert dataset.blocks == [10_000, 10_001, 10_002, 10_003, 10_004]
    ahead.at(9_000)  # a thread behind changes nothing
    assert dataset.blocks[0] == 10_000


def test_blocks_in_use_leave_room_for_those_to_come():
    # Ten blocks are read over and over for a hundred steps, as a shuffle window is; the next ten must be named meanwhile.
    dataset = Told()
    ahead = Lookahead(
        [dataset],
        blocks_of=lambda s: [(0, s // 100 * 10 + s % 10)],
        block_bytes=lambda *_: 1,
        limit_bytes=10,
        kept_bytes=50,
    )
    for step in range(60):
        ahead.at(step)
    assert set(dataset.blocks) >= set(range(10, 15))
