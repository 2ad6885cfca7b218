import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.data.damage import Quarantine, stand_in
from dstrain.data.plan import Plan


def plan_of(rows):
    return Plan.single(np.array(rows), seed=4, source="train", global_batch=4, lanes=2)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=10), st.data())
def test_a_substitute_is_another_row_of_the_same_source_and_epoch_and_always_the_same(rows, data):
    plan = plan_of([*rows, 4])
    block = data.draw(st.integers(0, len(rows) - 1))
    row = (0, 3, block, data.draw(st.integers(0, rows[block] - 1)))
    found = stand_in("substitute", plan, row, avoid={block})
    assert found == stand_in("substitute", plan, row, avoid=[block])
    assert found is not None
    assert found[:2] == (0, 3)
    assert found[2] != block
    assert 0 <= found[3] < plan.orders[0].rows_per_block[found[2]]


def test_a_masked_row_has_no_substitute_and_neither_has_one_where_all_is_damaged():
    plan = plan_of([4, 4])
    assert stand_in("mask", plan, (0, 0, 0, 0), avoid={0}) is None
    assert stand_in("substitute", plan, (0, 0, 0, 0), avoid={0, 1}) is None


def test_blocks_are_closed_once_and_from_their_step_on():
    quarantine = Quarantine(["a", "b"], num_blocks=100, allowance=0.05)
    assert quarantine.close([("b", 7), ("a", 2), ("b", 7)], from_step=9) == [("a", 2, 9), ("b", 7, 9)]
    assert quarantine.close([("b", 7)], from_step=12) == []
    assert [quarantine.is_closed(1, 7, step) for step in (8, 9, 99)] == [False, True, True]
    assert not quarantine.is_closed(0, 7, 99)
    again = Quarantine(["a", "b"], num_blocks=100, allowance=0.05)
    again.restore([list(entry) for entry in quarantine.entries()])
    assert again.entries() == quarantine.entries() == [("a", 2, 9), ("b", 7, 9)]


def test_the_allowance_stops_the_run_with_the_count():
    quarantine = Quarantine(["a"], num_blocks=1000, allowance=0.002)
    quarantine.close([("a", 1), ("a", 2)], from_step=0)
    with pytest.raises(DataError, match=r"3 of 1000 blocks are damaged, data\.damage_allowance lets 2 pass"):
        quarantine.close([("a", 3)], from_step=5)


def test_one_block_may_always_be_damaged():
    Quarantine(["a"], num_blocks=3, allowance=0.0).close([("a", 1)], from_step=0)
