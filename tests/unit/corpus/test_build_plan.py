from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.corpus.build_config import ShardBuildConfig
from dstrain.corpus.build_plan import estimate_sizes, held_out_below, map_tasks, num_groups, reduce_tasks, scan_tasks
from dstrain.corpus.sources import Source

HASH = st.integers(0, (1 << 64) - 1)
CONFIG = ShardBuildConfig()
MIB, GIB = 1 << 20, 1 << 30


@given(st.lists(st.lists(HASH, max_size=5), min_size=1, max_size=6), st.sampled_from([1e-9, 0.01, 0.5]))
def test_something_is_held_out_but_never_all(tasks, fraction):
    bounds = [[min(hashes), max(hashes)] if hashes else [None, None] for hashes in tasks]
    threshold = held_out_below(bounds, fraction)
    found = [value for hashes in tasks for value in hashes]
    held_out = [value for value in found if value < threshold]
    if len(set(found)) > 1:
        assert 0 < len(held_out) < len(found)
    else:
        assert held_out == []
    assert held_out_below(bounds, 0) == 0


@given(st.integers(1, 1 << 50), st.integers(64, 8192))
def test_reduce_tasks_write_enough_blocks_and_never_outnumber_the_buckets(text, buckets):
    groups = num_groups(text, buckets=buckets, config=CONFIG, token_bytes=2)
    assert 1 <= groups <= buckets
    assert groups == 1 or text / groups >= 10 * CONFIG.block_tokens * 4


def test_large_corpora_get_full_shards():
    groups = num_groups(1 << 42, buckets=8192, config=CONFIG, token_bytes=2)
    assert (1 << 42) / 4 * 2 / groups == pytest.approx(2 * CONFIG.shard_bytes)


def test_sizes_count_packed_text_and_admit_what_they_do_not_know():
    sizes = estimate_sizes([Source("a.jsonl.gz", 3 * GIB), Source("b.txt", GIB)])
    assert (sizes.stored_bytes, sizes.text_bytes) == (4 * GIB, 13 * GIB)
    assert estimate_sizes([Source("hf:x", None)]).text_bytes is None


def test_tasks_take_whole_inputs_and_parts_in_order(tmp_path):
    sources = []
    for name in "ab":
        path = tmp_path / f"{name}.txt"
        path.write_text("text")
        sources.append(Source(str(path), 3 * MIB))
    sizes = estimate_sizes(sources)
    scans = scan_tasks([*sources, Source("hf:set", None)], sizes, CONFIG)
    assert [task.weight for task in scans] == [3 * MIB, 3 * MIB]
    results = {
        source.name: {
            "state": [],
            "sha256": name,
            "parts": [
                {"name": source.name, "size_bytes": MIB + MIB // 2, "start": at, "stop": at + 1, "first_row": 0}
                for at in range(2)
            ],
        }
        for name, source in zip("ab", sources)
    }
    maps = map_tasks([*sources, Source("hf:set", None)], results, sizes, CONFIG)
    found = [[(entry["label"], entry["source"]["start"]) for entry in task.payload["parts"]] for task in maps]
    assert found == [[("a.txt", 0)], [("a.txt", 1)], [("b.txt", 0)], [("b.txt", 1)], [("hf:set", None)]]
    # Another input's change leaves a task's name alone, the seed does not.
    results[sources[1].name]["sha256"] = "c"
    again = map_tasks([*sources, Source("hf:set", None)], results, sizes, CONFIG)
    assert [a.name == b.name for a, b in zip(maps, again)] == [True, True, False, False, True]
    seeded = map_tasks(sources, results, sizes, ShardBuildConfig(seed=1))
    assert {task.name for task in seeded}.isdisjoint(task.name for task in again)
    # Settings that only reduce tasks read keep map results valid.
    blocks = map_tasks(sources, results, sizes, ShardBuildConfig(block_tokens=64))
    assert [task.name for task in blocks] == [task.name for task in again[:4]]


def test_reduce_tasks_are_named_by_plan_and_group():
    plan = {"groups": 3, "text_bytes": 30}
    tasks = reduce_tasks("plan-a", plan)
    assert [task.payload["group"] for task in tasks] == [0, 1, 2]
    assert {task.name for task in tasks}.isdisjoint(task.name for task in reduce_tasks("plan-b", plan))
