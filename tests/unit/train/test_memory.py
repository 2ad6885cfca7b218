"""Out of memory is a fault that names the setting; any other error stays what it is."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from dstrain.base.errors import ConfigError
from dstrain.train import memory
from dstrain.train.footprint import Batch, largest_micro_batch
from dstrain.train.memory import advice_for, is_out_of_memory, memory_faults_named
from dstrain.train.traffic import Sharding
from tests.support.tiny_models import documents, packed
from tests.unit.train.test_traffic import ANATOMY


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nmore lines"),
    ],
)
def test_both_forms_name_the_micro_batch_and_what_torch_said(error: RuntimeError) -> None:
    message = r"step 10 does not fit .*: lower train\.micro_batch \(now 32"
    with (
        pytest.raises(ConfigError, match=message) as caught,
        memory_faults_named(what="step 10", micro_batch=32, device="cuda"),
    ):
        raise error
    assert str(error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_allocation_that_cannot_be_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_one_row_is_no_micro_batch_to_lower() -> None:
    with (
        pytest.raises(ConfigError, match=r"lower data\.sequence_length"),
        memory_faults_named(what="step 1", micro_batch=1, device="cpu"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RuntimeError, match="shape mismatch"),
        memory_faults_named(what="step 1", micro_batch=1, device="cpu"),
    ):
        raise RuntimeError("shape mismatch")


def test_the_plan_says_what_needs_the_memory_and_how_many_rows_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "capacity_bytes", lambda device, ranks_here: 3 << 30)
    batch = packed(documents((64, 32) * 16))
    most = largest_micro_batch(
        ANATOMY, Sharding(1, "bf16", 2), Batch(48, 48, 0.0), device="cuda", capacity_bytes=3 << 30, rows=1 << 20
    )
    big = replace(batch, lengths=(64,) * most * 3, targets=torch.zeros(0, dtype=torch.int64))
    told = advice_for(ANATOMY, Sharding(1, "bf16", 2), [batch, big], micro_batch=3 * most, device="cuda", ranks_here=1)
    found = re.search(
        r"needs [\d.]+ GiB of 3\.00 GiB \(activations .*\); the largest train\.micro_batch that fits is (\d+)", told
    )
    assert found, told
    assert 0 < int(found[1]) < 3 * most


def test_what_should_fit_is_not_blamed_on_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "capacity_bytes", lambda device, ranks_here: 64 << 30)
    told = advice_for(
        ANATOMY, Sharding(1, "bf16", 2), [packed(documents())], micro_batch=6, device="cuda", ranks_here=1
    )
    assert "something else holds memory" in told


def test_a_model_too_large_for_one_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "capacity_bytes", lambda device, ranks_here: 1 << 20)
    told = advice_for(
        ANATOMY, Sharding(0, "bf16", 2), [packed(documents())], micro_batch=6, device="cuda", ranks_here=1
    )
    assert "not even one row" in told


def test_advice_is_part_of_the_fault_and_asked_for_only_then() -> None:
    asked: list[int] = []
    with memory_faults_named(what="step 1", micro_batch=4, device="cpu", advice=lambda: str(asked.append(1))):
        pass
    assert asked == []
    with (
        pytest.raises(ConfigError, match=r"\. By the plan 3 rows"),
        memory_faults_named(what="step 1", micro_batch=4, device="cpu", advice=lambda: "By the plan 3 rows"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_engine_without_room_is_no_matter_of_the_micro_batch() -> None:
    told = advice_for(ANATOMY, Sharding(0, "bf16", 2), [], micro_batch=6, device="cpu", ranks_here=2)
    assert told.endswith("before the first micro-batch")
    with (
        pytest.raises(
            ConfigError, match=r"^the engine does not fit the memory of the GPU: raise engine\.zero_stage"
        ) as caught,
        memory_faults_named(what="the engine", micro_batch=None, device="cuda", advice=lambda: told),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "micro_batch (now" not in str(caught.value)
