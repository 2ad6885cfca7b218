"""Row 16 of the targets: a node downloads at most 1.1 times its share of an epoch, at any cache size."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dstrain.data import cache
from dstrain.data.cache import DiskCache
from dstrain.data.cached_store import CachedStore
from dstrain.data.plan import Plan, rank_slots
from dstrain.data.stores import Extent, StorageConfig
from tests.support.memory_store import MemoryStore

BLOCKS, BLOCK_BYTES, ROWS, LANES, GLOBAL_BATCH = 600, 9000, 32, 16, 64
NODES, RANKS_A_NODE = 2, 2


def block_extent(block: int) -> Extent:
    """Ten shards; 1 KiB of tar headers and padding between two blocks."""
    return Extent(f"shard-{block // 60:06d}.tar", (block % 60) * (BLOCK_BYTES + 1024), BLOCK_BYTES)


@pytest.mark.parametrize("cached", [False, True])
def test_a_node_downloads_little_more_than_its_share_of_an_epoch(tmp_path, monkeypatch, cached):
    monkeypatch.setattr(cache.os, "fsync", lambda _: None)
    shard = random.Random(0).randbytes(60 * (BLOCK_BYTES + 1024))
    plan = Plan.single(
        np.full(BLOCKS, ROWS), seed=1, source="s", global_batch=GLOBAL_BATCH, lanes=LANES, window_rows=256
    )
    steps = BLOCKS * ROWS // GLOBAL_BATCH
    world = NODES * RANKS_A_NODE
    config = StorageConfig(prefetch_bytes=20 * BLOCK_BYTES, range_bytes=4 * BLOCK_BYTES, connections=2)
    needed_share, shares = [], []
    for node in range(NODES):
        origin = MemoryStore({f"shard-{n:06d}.tar": shard for n in range(BLOCKS // 60)})
        identities = {name: f"{n:064x}" for n, name in enumerate(sorted(origin.files))}
        needed: set[int] = set()
        for rank in range(node * RANKS_A_NODE, (node + 1) * RANKS_A_NODE):
            # A quarter of the node's data fits; decoded blocks of a window are kept in memory, as data.rows does.
            disk = (
                DiskCache(tmp_path / str(node), limit_bytes=BLOCKS * BLOCK_BYTES // 8, horizon_bytes=20 * BLOCK_BYTES)
                if cached
                else None
            )
            store = CachedStore(origin, config, identities=identities, cache=disk)
            first, last = rank_slots(GLOBAL_BATCH, rank=rank, world_size=world)
            order = [plan.slots(step, first, last).block.tolist() for step in range(steps)]
            needed.update(block for blocks in order for block in blocks)
            soonest = list(dict.fromkeys(block for blocks in order for block in blocks))
            store.will_need([block_extent(block) for block in soonest])
            for block in soonest:
                extent = block_extent(block)
                assert store.read(*extent) == shard[extent.offset : extent.offset + extent.length]
            store.close()
        shares.append(origin.bytes_read / (BLOCKS * BLOCK_BYTES))
        needed_share.append(len(needed) / BLOCKS)
    assert max(needed_share) <= 1.1 / NODES
    assert max(shares) <= 1.1 / NODES, shares
    assert sum(shares) >= 0.95  # together they read everything
