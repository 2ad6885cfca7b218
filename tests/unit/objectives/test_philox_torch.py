import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.objectives import philox
from dstrain.objectives.philox_torch import philox4x32

word = st.integers(0, 2**32 - 1)
EDGES = [0, 1, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


@given(st.lists(st.tuples(word, word, word, word), min_size=1, max_size=5), st.integers(0, 2**64 - 1))
def test_tensors_give_the_words_of_numpy(counters, key):
    columns = [np.array(part) for part in zip(*counters)]
    expected = philox.philox4x32(tuple(columns), key)
    found = philox4x32(tuple(torch.from_numpy(column) for column in columns), key)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.numpy(), b.astype(np.int64))


def test_words_at_the_edges_of_halves_and_signs_are_right_too():
    grid = np.array(np.meshgrid(EDGES, EDGES, EDGES, EDGES)).reshape(4, -1)
    expected = philox.philox4x32(tuple(grid), 2**64 - 1)
    found = philox4x32(tuple(torch.from_numpy(row.copy()) for row in grid), 2**64 - 1)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.numpy(), b.astype(np.int64))


def test_the_known_answer_of_random123():
    counter = tuple(torch.tensor(value) for value in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    found = philox4x32(counter, 0x299F31D0A4093822)
    assert [f"{int(part):08x}" for part in found] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.gpu
def test_a_gpu_gives_the_words_of_numpy():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    columns = np.random.default_rng(1).integers(-(2**63), 2**63, (4, 100_000))
    expected = philox.philox4x32(tuple(columns), 0x1234567890ABCDEF)
    found = philox4x32(tuple(torch.from_numpy(c.copy()).cuda() for c in columns), 0x1234567890ABCDEF)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.cpu().numpy(), b.astype(np.int64))
