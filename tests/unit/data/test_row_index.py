import numpy as np
import pytest

from dstrain.data.packing import pack
from dstrain.data.row_index import rows_per_block

SETTINGS = dict(num_blocks=3, fingerprint="f" * 64, sequence_length=16, frame_length=2, may_write=True)
ENDS = [np.cumsum(lengths).astype(np.uint32) for lengths in ([5, 9, 30], [3], [8, 8, 8, 8])]
FILE = "rows-S16.v1.idx"


class Dataset:
    """Three blocks that count how often they are asked."""

    def __init__(self, path):
        self.notes_folder, self.asked = path, []

    def ends(self, block):
        self.asked.append(block)
        return ENDS[block]


def rows(path, **changes):
    """The index and the blocks that were read for it."""
    dataset = Dataset(path)
    return rows_per_block(dataset, **(SETTINGS | changes)).tolist(), dataset.asked


EXPECTED = [pack(ends, sequence_length=16, frame_length=2).num_rows for ends in ENDS]


def test_rows_are_those_of_the_packer(tmp_path):
    assert rows(tmp_path) == (EXPECTED, [0, 1, 2])


def test_a_second_start_reads_no_block(tmp_path):
    rows(tmp_path)
    assert rows(tmp_path) == (EXPECTED, [])
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("change", [{"fingerprint": "e" * 64}, {"frame_length": 1}, {"num_blocks": 2}])
def test_an_index_of_something_else_is_made_again_and_replaced(change, tmp_path):
    rows(tmp_path)
    _, asked = rows(tmp_path, **change)
    assert asked == list(range(change.get("num_blocks", 3)))
    assert rows(tmp_path, **change)[1] == []
    assert rows(tmp_path) == (EXPECTED, [0, 1, 2])


def test_each_sequence_length_has_an_index_of_its_own(tmp_path):
    rows(tmp_path)
    rows(tmp_path, sequence_length=32)
    assert rows(tmp_path)[1] == rows(tmp_path, sequence_length=32)[1] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
        lambda data: b"X" + data[1:],
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    ],
    ids=["cut", "longer", "empty", "flipped rows", "magic", "flipped hash"],
)
def test_a_damaged_index_is_never_trusted(damage, tmp_path):
    rows(tmp_path)
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    assert rows(tmp_path) == (EXPECTED, [0, 1, 2])
    assert rows(tmp_path) == (EXPECTED, [])


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    assert rows(tmp_path / "missing") == (EXPECTED, [0, 1, 2])


def test_a_rank_that_may_not_write_leaves_no_file(tmp_path):
    assert rows(tmp_path, may_write=False) == (EXPECTED, [0, 1, 2])
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_a_place_for_notes_is_counted_at_every_start():
    assert rows(None) == rows(None) == (EXPECTED, [0, 1, 2])
