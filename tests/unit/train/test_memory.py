"""Out of memory is a fault that names the setting; any other error stays what it is."""

from __future__ import annotations

import pytest
import torch

from dstrain.base.errors import ConfigError
from dstrain.train.memory import is_out_of_memory, memory_faults_named


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
        memory_faults_named(micro_batch=32, device="cuda", step=9),
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
        memory_faults_named(micro_batch=1, device="cpu", step=0),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), memory_faults_named(micro_batch=1, device="cpu", step=0):
        raise RuntimeError("shape mismatch")
