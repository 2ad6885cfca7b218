from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.data.source_order import EMPTY, SourceOrder


def epoch_rows(order, epoch):
    lane, turn = np.meshgrid(np.arange(order.lanes), np.arange(order.turns_per_epoch))
    epochs, block, row = order.locate(lane.ravel(), turn.ravel() + epoch * order.turns_per_epoch)
    assert set(epochs.tolist()) <= {epoch}
    return list(zip(block.tolist(), row.tolist()))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from(["rotate", "exact"]),
    st.integers(0, 5),
)
def test_an_epoch_has_every_kept_row_once(rows, lanes, window, tail, epoch):
    total = sum(rows)
    if lanes > total:
        with pytest.raises(ConfigError, match=rf"data\.lanes: {lanes} lanes are more than the {total} rows"):
            SourceOrder(rows, seed=1, source="s", lanes=lanes, window_rows=window, tail=tail)
        return
    order = SourceOrder(rows, seed=1, source="s", lanes=lanes, window_rows=window, tail=tail)
    seen = Counter(epoch_rows(order, epoch))
    empty = seen.pop((EMPTY, EMPTY), 0)
    assert set(seen.values()) == {1}
    assert all(0 <= row < rows[block] for block, row in seen)
    assert len(seen) == order.rows_per_epoch == (total if tail == "exact" else total // lanes * lanes)
    assert empty == (-total % lanes if tail == "exact" else 0)


def test_an_exact_epoch_is_short_in_its_last_turn_only():
    order = SourceOrder([10, 7], seed=0, source="s", lanes=4, window_rows=3, tail="exact")  # 17 rows: 5, 4, 4, 4
    assert order.turns_per_epoch == 5
    for epoch in range(3):
        block = order.locate(np.arange(4), np.full(4, 5 * epoch + 4))[1]
        assert (block == EMPTY).tolist() == [False, True, True, True]
        assert (order.locate(np.arange(4), np.full(4, 5 * epoch + 3))[1] != EMPTY).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_row_numbers_count_through_the_stored_rows(rows):
    order = SourceOrder(rows, seed=0, source="s", lanes=1, window_rows=8)
    pairs = [(block, row) for block, count in enumerate(rows) for row in range(count)]
    block, row = np.array(pairs).T
    assert order.row_number(block, row).tolist() == list(range(sum(rows)))


def test_an_empty_source_is_refused_by_name():
    with pytest.raises(ConfigError, match="source 'wiki' has no rows"):
        SourceOrder([0, 0], seed=0, source="wiki", lanes=1, window_rows=8)
