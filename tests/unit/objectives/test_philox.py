import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.objectives import philox
from dstrain.objectives.philox import philox4x32

word = st.integers(0, 2**32 - 1)


def plain(counter, key):
    """Philox4x32-10 as its paper writes it, in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_known_answers_of_random123(counter, key, answer):
    assert " ".join(f"{int(part):08x}" for part in philox4x32(counter, key)) == answer


@given(st.lists(st.tuples(word, word, word, word), min_size=1, max_size=5), st.integers(0, 2**64 - 1))
def test_every_element_is_that_of_the_plain_algorithm(counters, key):
    found = philox4x32(tuple(np.array(part) for part in zip(*counters)), key)
    assert [list(map(int, parts)) for parts in zip(*found)] == [plain(counter, key) for counter in counters]


@pytest.mark.parametrize("size", [0, 1, philox._CHUNK - 1, philox._CHUNK, 2 * philox._CHUNK + 5])
def test_large_arrays_are_cut_without_a_seam(size):
    index = np.arange(size)
    found = philox4x32((index, 1, 2, 3), 99)
    assert [part.shape for part in found] == [(size,)] * 4
    some = [i for i in (0, philox._CHUNK - 1, philox._CHUNK, size - 1) if 0 <= i < size]
    for i in some:
        assert [int(part[i]) for part in found] == plain((i, 1, 2, 3), 99)


def test_shapes_broadcast_and_inputs_stay_as_they_are():
    rows, columns = np.arange(3)[:, None], np.arange(4)
    before = rows.copy(), columns.copy()
    found = philox4x32((rows, columns, 0, 0), 5)
    assert {part.shape for part in found} == {(3, 4)}
    assert {part.dtype for part in found} == {np.dtype(np.uint32)}
    assert int(found[2][2, 3]) == plain((2, 3, 0, 0), 5)[2]
    np.testing.assert_array_equal(rows, before[0])
    np.testing.assert_array_equal(columns, before[1])


def test_only_the_low_32_bits_of_a_counter_word_count():
    high, low = philox4x32((2**40 + 7, 0, 0, 0), 1), philox4x32((7, 0, 0, 0), 1)
    assert [int(a) for a in high] == [int(b) for b in low]


def test_words_are_uniform():
    for part in philox4x32((np.arange(64_000), 0, 0, 0), 3):
        counts = np.bincount(part >> 26, minlength=64)
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
