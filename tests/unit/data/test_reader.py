"""P16: damage never delivers a wrong token; every kind is a named refusal."""

from __future__ import annotations

import io
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.data import stores
from dstrain.data.reader import ShardDataset, parse_npy, unpack_zstd


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def read_all(path: Path) -> list[list[int]]:
    dataset = ShardDataset(path)
    return [dataset.read(block).tokens.tolist() for block in range(dataset.manifest.num_blocks)]


@pytest.fixture(scope="module")
def truth(shards) -> list[list[int]]:
    return read_all(shards / "train")


def test_threads_read_the_same_blocks(shards, truth, monkeypatch):
    monkeypatch.setattr(stores, "MAX_OPEN_FILES", 1)  # files are closed under the other threads' feet
    dataset = ShardDataset(shards / "train")
    wrong: list[int] = []

    def work(start: int) -> None:
        for k in range(200):
            block = (start * 31 + k * 7) % len(truth)
            if dataset.read(block).tokens.tolist() != truth[block]:
                wrong.append(block)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(dataset.manifest.shards) > 1
    assert not wrong


def test_a_dataset_travels_to_another_process_and_reopens(shards, truth):
    dataset = ShardDataset(shards / "train")
    dataset.read(0)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.read(1).tokens.tolist() == truth[1]
    dataset.close()
    assert dataset.read(0).tokens.tolist() == truth[0]


def test_blocks_are_read_only_and_bounded(shards, truth):
    dataset = ShardDataset(shards / "train")
    with pytest.raises(ValueError, match="read-only"):
        dataset.read(0).tokens[0] = 1
    for block in (-1, len(truth)):
        with pytest.raises(IndexError):
            dataset.read(block)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(damaged, truth, place, bit):
    path = damaged / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        dataset = ShardDataset(damaged)
        for block, expected in enumerate(truth):
            found = tokens_or_refusal(dataset, block)
            assert found == expected or f"shard-000000.tar: block {block} is damaged" in found
    finally:
        data[place % len(data)] ^= 1 << bit
        path.write_bytes(data)


def tokens_or_refusal(dataset: ShardDataset, block: int) -> list[int] | str:
    try:
        return dataset.read(block).tokens.tolist()
    except DataError as error:
        return str(error)


def test_a_flipped_bit_in_a_payload_names_shard_block_and_mend(damaged):
    dataset = ShardDataset(damaged)
    record = dataset.blocks[2]
    path = damaged / dataset.manifest.shards[int(record["shard"])].name
    data = bytearray(path.read_bytes())
    data[int(record["off"]) + 130] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: block 2 is damaged.*crc32.*dstrain shards verify"):
        dataset.read(2)
    dataset.ends(2)  # the ends have a checksum of their own
    data[int(record["off"]) - int(record["ends_off"]) + 130] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="checksum of the document ends"):
        dataset.ends(2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut", lambda data: data[:-512], r"shard-000000\.tar: \d+ bytes, the manifest says \d+: cut or replaced"),
        ("cut inside a header", lambda data: data[:700], "cut or replaced"),
        ("empty", lambda data: b"", "0 bytes, the manifest says"),
        ("html", lambda data: b"<html>404</html>", "cut or replaced"),
        ("zeroed", lambda data: bytes(len(data)), "block 0 is damaged"),
        ("shifted", lambda data: data[512:] + data[:512], "block 0 is damaged"),
    ],
)
def test_damaged_shards_are_refused(damaged, name, content, message):
    path = damaged / "shard-000000.tar"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        read_all(damaged)


def test_a_missing_shard_is_refused_at_once(damaged):
    (damaged / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: this shard is missing"):
        ShardDataset(damaged)


def test_a_shard_cut_while_training_is_refused(damaged):
    dataset = ShardDataset(damaged)
    dataset.read(0)
    with open(damaged / "shard-000000.tar", "r+b") as file:
        file.truncate(1024)
    with pytest.raises(DataError, match=r"ends at byte \d+: cut.*block 1 was asked for"):
        dataset.read(1)


def test_swapped_shards_and_a_changed_index_are_refused(damaged):
    index = damaged / "blocks.idx"
    data = bytearray(index.read_bytes())
    data[33] ^= 1
    index.write_bytes(data)
    with pytest.raises(DataError, match=r"blocks\.idx: sha256 differs"):
        ShardDataset(damaged)


def npy(array: np.ndarray, *, version: tuple[int, int] = (1, 0)) -> memoryview:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return memoryview(buffer.getvalue())


def test_only_the_expected_npy_is_parsed():
    good = np.arange(5, dtype="<u2")
    kind = {"count": 5, "dtype": np.dtype("<u2"), "exact": True}
    assert parse_npy(npy(good), **kind).tolist() == [0, 1, 2, 3, 4]
    bad = [
        npy(good.astype("<u4")),
        npy(good.astype(">u2")),
        npy(good[:4]),
        npy(good.reshape(1, 5)),
        npy(good, version=(2, 0)),
        npy(np.array([{}], dtype=object)),
        memoryview(bytes(npy(good)) + b"x"),
        npy(good)[:-1],
        memoryview(b"garbage" * 40),
        memoryview(b""),
        memoryview(b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70_000),
    ]
    for data in bad:
        with pytest.raises(ValueError):  # noqa: PT011  (any reason will do)
            parse_npy(data, **kind)


def test_only_one_whole_frame_of_the_declared_size_is_unpacked():
    content = bytes(range(256)) * 40
    frame = zstandard.ZstdCompressor(level=3).compress(content)
    assert bytes(unpack_zstd(memoryview(frame), raw_length=len(content))) == content
    undeclared = zstandard.ZstdCompressor(write_content_size=False).compress(content)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    for data in (undeclared, bomb, frame + b"x", frame + frame, frame[:-1], b"", b"PK\x03\x04" + content):
        with pytest.raises(ValueError, match="zstd frame"):
            unpack_zstd(memoryview(data), raw_length=len(content))
