"""P19: through 5xx, stalls, cuts, resets, drips and wrong ranges the delivered sequence is the same, or one clear error in time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dstrain.base.errors import DamagedBlockError, DataError, StorageError
from dstrain.data import cached_store, remote_store
from dstrain.data.reader import ShardDataset
from dstrain.data.stores import StorageConfig
from tests.support.block_shards import write_random_shards
from tests.support.fault_proxy import FAULTS, fault_proxy
from tests.support.http_range_server import serve_ranges
from tests.support.object_stores import ObjectStore, object_store

pytestmark = pytest.mark.fault

KINDS = ["http", "s3", "gs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write_random_shards(root / "train", documents=70, compression="zstd", shard_bytes=1 << 16)
    return root


@pytest.fixture(scope="module", params=KINDS)
def store(request, folder) -> Iterator[ObjectStore]:
    with object_store(request.param, folder) as found:
        yield found


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote_store, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(cached_store, "SMALL_BYTES", 64)  # the last block is short, and is to be cached too


def storage(**changes) -> StorageConfig:
    return StorageConfig(
        **{"request_timeout_s": 0.8, "deadline_s": 30.0, "prefetch_bytes": 1 << 17, "anonymous": False} | changes
    )


def order_of(dataset: ShardDataset) -> list[int]:
    return np.random.default_rng(5).permutation(dataset.manifest.num_blocks).tolist()


def read_all(dataset: ShardDataset) -> list[bytes]:
    order = order_of(dataset)
    dataset.will_need(order)
    try:
        return [dataset.read(block).tokens.tobytes() + dataset.ends(block).tobytes() for block in order]
    finally:
        dataset.close()


@pytest.fixture(scope="module")
def truth(folder) -> list[bytes]:
    return read_all(ShardDataset(folder / "train"))


def is_anonymous(store: ObjectStore) -> bool:
    return store.url_at(0).startswith("gs://")


def test_a_remote_dataset_is_the_local_one(store, truth, folder):
    with store.at(store.port) as url:
        dataset = ShardDataset(f"{url}/train", storage=storage(anonymous=is_anonymous(store)))
        assert dataset.manifest == ShardDataset(folder / "train").manifest
        assert read_all(dataset) == truth


@pytest.mark.parametrize("cached", [False, True])
def test_faults_change_nothing(store, truth, tmp_path, cached):
    # Bytes of another place pass for right on S3 and GCS until a block's checksum; they are read again, past the cache.
    faults = [fault for fault in FAULTS if not cached or fault != "shifted"]
    with fault_proxy(store.port, seed=7, share=0.35, faults=faults) as proxy, store.at(proxy.port) as url:
        config = storage(anonymous=is_anonymous(store), cache_dir=tmp_path / "cache" if cached else None)
        assert read_all(ShardDataset(f"{url}/train", storage=config)) == truth
        assert sum(proxy.met.values()) >= 5, proxy.met
        if cached:
            again = ShardDataset(f"{url}/train", storage=config)
            proxy.broken = "503"  # all that is needed now lies on disk
            again.will_need(order_of(again))
            found = [again.read(b).tokens.tobytes() for b in order_of(again)]
            assert all(whole.startswith(tokens) for whole, tokens in zip(truth, found))
            again.close()


@contextmanager
def impatient(dataset: ShardDataset) -> Iterator[None]:
    """Two seconds for a read, for a while only: a client's first request, with all that it loads, may take longer."""
    origin = dataset._store._store
    patient = origin._config
    origin._config = patient.model_copy(update={"deadline_s": 2.0, "request_timeout_s": 1.0})
    try:
        yield
    finally:
        origin._config = patient


@pytest.mark.parametrize("fault", ["503", "stall", "truncate"])
def test_a_store_that_stays_broken_is_one_clear_error_in_time(store, fault):
    with fault_proxy(store.port, share=0.0) as proxy, store.at(proxy.port) as url:
        dataset = ShardDataset(f"{url}/train", storage=storage(anonymous=is_anonymous(store)))
        with impatient(dataset):
            proxy.broken = fault
            dataset.will_need(order_of(dataset))
            begin = time.monotonic()
            with pytest.raises(StorageError, match=rf"{url}/train/shard-\d+\.tar: not readable: \d+ tries in "):
                dataset.read(3)
            assert time.monotonic() - begin < 20
        proxy.broken = None
        assert dataset.read(3).tokens.size  # the store is back: so is the dataset
        dataset.close()


def test_what_is_not_there_is_told_at_once(store):
    with store.at(store.port) as url:
        with pytest.raises(DataError, match=r"nothing-here/manifest\.json: no such file in the store"):
            ShardDataset(f"{url}/nothing-here", storage=storage(anonymous=is_anonymous(store)))


def test_a_web_server_without_ranges_is_told_at_once(folder):
    with serve_ranges(folder, ranges=False) as server:
        dataset = ShardDataset(f"{server.url}/train", storage=storage(deadline_s=600.0))  # small files are read whole
        begin = time.monotonic()
        with pytest.raises(DataError, match="the server does not answer byte ranges"):
            dataset.read(2)
        assert time.monotonic() - begin < 60
        dataset.close()


def test_damage_in_the_store_is_asked_for_once_more_and_then_named(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with object_store("http", copy) as store, store.at(store.port) as url:
        dataset = ShardDataset(f"{url}/train", storage=storage(cache_dir=tmp_path / "cache"))
        record = dataset.blocks[2]
        path = copy / "train" / dataset.manifest.shards[int(record["shard"])].name
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[int(record["off"]) + 40] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DamagedBlockError, match=r"shard-\d+\.tar: block 2 is damaged: the checksum") as refusal:
            dataset.read(2)
        assert (refusal.value.dataset, refusal.value.block) == (f"{url}/train", 2)
        path.write_bytes(sound)  # put right in the store: the bad bytes that were cached are not used again
        assert np.array_equal(dataset.read(2).tokens, ShardDataset(folder / "train").read(2).tokens)
        dataset.close()
