import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.data.order import largest_divisor, mix64, permute, subkey

keys = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, 0xDEADBEEF])
def test_every_size_from_1_to_600_is_permuted(key):
    sizes = np.arange(1, 601)
    n = np.repeat(sizes, sizes)
    index = np.concatenate([np.arange(size) for size in sizes])
    there = permute(index, n, key)
    assert there.dtype == np.int64
    order = np.lexsort((there, n))
    np.testing.assert_array_equal(there[order], index)  # within each size, every place is taken once


@given(st.integers(1, 2**40), keys, st.data())
def test_no_two_indices_of_a_huge_range_meet(n, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=200)))
    there = permute(index, n, key)
    assert len(set(there.tolist())) == len(index)
    assert there.min() >= 0
    assert there.max() < n


@given(st.integers(2, 5000), keys)
def test_array_sizes_and_keys_give_what_scalars_give(n, key):
    sizes = np.array([n, n - 1, n])
    names = np.array([key, key, key ^ 1], dtype=np.uint64)
    together = permute(np.zeros(3, dtype=np.int64), sizes, names)
    single = [int(permute(0, int(size), int(name))) for size, name in zip(sizes, names)]
    assert together.tolist() == single


def test_shapes_broadcast():
    grid = permute(np.arange(6)[:, None], 6, np.arange(4, dtype=np.uint64)[None, :])
    assert grid.shape == (6, 4)
    np.testing.assert_array_equal(grid[:, 2], permute(np.arange(6), 6, 2))
    assert permute(np.zeros(0, dtype=np.int64), 5, 1).shape == (0,)


@pytest.mark.parametrize(("index", "n"), [(5, 5), (-1, 5), ([0, 7], [1, 7])])
def test_an_index_outside_the_range_is_refused(index, n):
    with pytest.raises(DataError, match=r"order: an index is outside \[0, "):
        permute(index, n, 1)


def test_known_orders_never_change():
    # A change here needs a new ORDER_VERSION: it would give every running job another order.
    assert permute(np.arange(10), 10, 0).tolist() == [9, 4, 2, 6, 7, 8, 5, 3, 1, 0]
    assert permute(np.arange(7), 7, 2**64 - 1).tolist() == [4, 5, 6, 3, 0, 1, 2]
    far = permute([0, 1, 2**39, 2**40 - 2], 2**40 - 1, 12345).tolist()
    assert far == [916776482253, 336846626091, 458736930143, 505257553074]
    assert subkey(7, np.arange(3), 5).tolist() == [8414640956829562658, 12734608566132837747, 12194682406273399074]


def test_the_mixer_is_splitmix64s():
    # The first outputs of splitmix64 seeded with 0, from its authors' reference code.
    golden = 0x9E3779B97F4A7C15
    state = np.array([golden * (i + 1) % 2**64 for i in range(3)], dtype=np.uint64)
    assert [hex(v) for v in mix64(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_every_index_goes_everywhere_equally_often_over_keys():
    names = subkey(1, np.arange(8000))
    for index in (0, 7):
        counts = np.bincount(permute(index, 8, names), minlength=8)
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 7 / 8)


def test_orders_of_different_keys_are_unrelated():
    orders = permute(np.arange(2000)[None, :], 2000, subkey(3, np.arange(6))[:, None])
    correlation = np.corrcoef(orders) - np.eye(6)
    assert np.abs(correlation).max() < 4 / np.sqrt(2000)


def test_subkeys_depend_on_every_part_and_on_their_order():
    found = {int(subkey(*parts)) for parts in [(1,), (1, 0), (1, 0, 0), (1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2)]}
    assert len(found) == 7


@given(st.integers(1, 2000), st.integers(1, 300))
def test_the_largest_divisor_is_that_of_a_search(n, most):
    assert largest_divisor(n, at_most=most) == max(d for d in range(1, min(n, most) + 1) if n % d == 0)
