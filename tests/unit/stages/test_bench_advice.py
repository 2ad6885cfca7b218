"""Forecast and advice follow from the numbers: each case changes what was measured and looks for its consequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.stages.bench_advice import PARTS, Measured, Need, advice, forecast, wait_share

GOOD = Measured(
    sequence_length=512,
    cpu_s_per_mtok={"read": 0.002, "packing": 0.008, "gather": 0.01, "masking": 0.02, "ledger": 0.01},
    wall_s=10.0,
    wall_mtok=150.0,
    reread_factor=1.0,
    block_tokens=131072,
    padding_percent=0.4,
    bytes_per_token=2.0,
    remote=False,
    compressed=False,
    store_mb_s=500.0,
    working_set_bytes=100 << 20,
    cache_bytes=1 << 30,
    first_batch_s=0.2,
    seek_ms={"start": 1.0, "far": 1.0},
)
H100 = Need(0.7, gpus_per_node=8)


def changed(**fields: Any) -> Measured:
    return dataclasses.replace(GOOD, **fields)


def said(measured: Measured, need: Need | None = H100) -> str:
    return "\n".join(advice(measured, need))


def test_nothing_is_to_be_changed_where_nothing_is_wrong() -> None:
    assert advice(GOOD, None) == ["nothing to change"]
    (praise,) = advice(GOOD, H100)
    assert praise.startswith("one core is enough for 29 of these GPUs")
    assert forecast(GOOD, H100).wait_share == 0


def test_the_steady_rate_pays_for_a_block_as_often_as_it_is_read() -> None:
    assert GOOD.steady_mtok_s == pytest.approx(20)
    assert changed(reread_factor=5.0).steady_mtok_s == pytest.approx(1 / 0.09)


def test_padding_asks_for_larger_blocks_that_fit_the_rows() -> None:
    text = said(changed(padding_percent=5.2, sequence_length=8192))
    assert "padding is 5.2 %" in text
    assert "--block-tokens 1048576" in text
    assert "padding" not in said(changed(padding_percent=5.2, sequence_length=8192, block_tokens=1 << 20))


def test_small_blocks_matter_only_where_they_cost_time() -> None:
    costly = {**GOOD.cpu_s_per_mtok, "read": 0.1}
    assert "blocks are small (4,096 tokens)" in said(changed(block_tokens=4096, cpu_s_per_mtok=costly))
    assert "blocks are small" not in said(changed(block_tokens=4096))


def test_windows_that_do_not_fit_the_cache_name_a_cache_that_holds_them() -> None:
    text = said(changed(working_set_bytes=3 << 30, reread_factor=40.0))
    assert "each block is read about 40.0 times" in text
    size = int(text.split("data.cache_bytes=")[1].split(",")[0])
    assert size >= 3 << 30
    window = int(text.split("data.window_rows=")[1].split()[0])
    assert 8192 // 8 <= window <= 8192 // 3


def test_slow_remote_storage_names_connections_cache_and_compression() -> None:
    slow = changed(remote=True, store_mb_s=0.35)
    text = said(slow)
    assert "GPUs would wait 75% of the time" in text
    assert "data.storage.connections" in text
    assert "data.storage.cache_dir" in text
    assert "zstd" in text
    assert "zstd" not in said(dataclasses.replace(slow, compressed=True))
    assert forecast(slow, H100).wait_share == pytest.approx(0.75)
    assert "one core is enough" not in text


def test_slow_local_storage_asks_for_another_disk() -> None:
    assert "faster local disk" in said(changed(store_mb_s=0.7))


def test_a_loader_slower_than_the_gpu_gets_as_many_threads_as_it_needs() -> None:
    slow = changed(cpu_s_per_mtok={**GOOD.cpu_s_per_mtok, "masking": 3.0})
    plan = forecast(slow, H100)
    assert plan.threads == 3
    assert plan.wait_share == 0
    assert "data.threads=3" in said(slow)
    assert "goes into masking" in said(slow)


def test_a_slow_seek_is_said_and_a_fast_one_is_not() -> None:
    assert "900 ms" in said(changed(seek_ms={"start": 1.0, "far": 900.0}))
    assert "far step" not in said(GOOD)


def test_unpacking_on_a_local_disk_is_said_where_it_dominates() -> None:
    costly = {**GOOD.cpu_s_per_mtok, "read": 0.08}
    assert "zstd" in said(changed(compressed=True, cpu_s_per_mtok=costly))
    assert "zstd" not in said(changed(compressed=True, remote=True, cpu_s_per_mtok=costly))


@given(
    costs=st.lists(st.floats(1e-4, 10), min_size=5, max_size=5),
    need=st.floats(0.01, 10),
    gpus=st.integers(1, 16),
    store=st.floats(0.01, 1e4),
    reread=st.floats(1, 100),
)
def test_a_forecast_adds_up(costs: list[float], need: float, gpus: int, store: float, reread: float) -> None:
    measured = changed(cpu_s_per_mtok=dict(zip(PARTS, costs)), store_mb_s=store, reread_factor=reread)
    plan = forecast(measured, Need(need, gpus_per_node=gpus))
    assert 0 <= plan.wait_share <= 1
    assert plan.cores_per_node == pytest.approx(gpus * plan.cores_per_gpu)
    assert plan.threads >= plan.cores_per_gpu - 0.002
    assert plan.threads <= plan.cores_per_gpu + 1
    enough = measured.store_mb_s >= need * measured.bytes_per_token * reread
    assert (plan.wait_share < 0.01) == enough or plan.wait_share < 0.01 + 1e-3


def test_nobody_waits_for_what_is_not_needed() -> None:
    assert wait_share(1.0, 0.0) == 0
    assert wait_share(0.0, 1.0) == 1
