import os
import platform

import pytest
import torch

from dstrain.base import device as device_module
from dstrain.base.device import choose_device, choose_precision, cpu_has_bf16, device_name, gpu_index
from dstrain.base.errors import MachineError


@pytest.fixture(autouse=True)
def _restore_accelerator(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "unset")


def gpu(monkeypatch, *, available, bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
        ("cpu", False, "cpu"),
    ],
)
def test_the_choice_is_explicit_and_told_to_deepspeed(wanted, available, chosen, monkeypatch):
    gpu(monkeypatch, available=available)
    assert choose_device(wanted) == chosen
    assert os.environ["DS_ACCELERATOR"] == chosen


def test_cuda_without_a_gpu_is_a_fault_of_the_machine_not_a_slow_run(monkeypatch):
    gpu(monkeypatch, available=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(MachineError, match=r"CUDA_VISIBLE_DEVICES=7.*engine\.device: cpu"):
        choose_device("cuda")
    assert os.environ["DS_ACCELERATOR"] == "unset"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_named_precision_is_taken_as_it_is(precision, device):
    assert choose_precision(precision, device=device) == precision


def test_fp16_needs_a_gpu():
    assert choose_precision("fp16", device="cuda") == "fp16"
    with pytest.raises(MachineError, match=r"engine\.precision: fp16 needs a GPU"):
        choose_precision("fp16", device="cpu")


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_bf16_only_where_it_is_native(native, precision, monkeypatch):
    gpu(monkeypatch, available=True, bf16=native)
    assert choose_precision("auto", device="cuda") == precision


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_is_bf16_only_where_it_is_native(native, precision, monkeypatch):
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: native)
    assert choose_precision("auto", device="cpu") == precision


@pytest.mark.parametrize("native", [True, False])
def test_x86_is_asked_through_torch(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert cpu_has_bf16() is native


def test_the_processor_has_a_name():
    assert device_name("cpu").strip()


@pytest.mark.parametrize(
    ("rank", "ranks", "visible", "per_task", "index"),
    [(0, 1, 1, False, 0), (3, 4, 4, False, 3), (1, 2, 8, False, 1), (3, 4, 1, True, 0), (1, 2, 2, True, 1)],
)
def test_a_rank_takes_its_own_gpu_also_where_srun_shows_it_no_other(
    rank: int, ranks: int, visible: int, per_task: bool, index: int
) -> None:
    assert gpu_index(rank, local_size=ranks, visible=visible, per_task=per_task) == index


@pytest.mark.parametrize(("visible", "per_task"), [(1, False), (2, True), (0, True)])
def test_fewer_gpus_than_ranks_are_refused(visible: int, per_task: bool) -> None:
    with pytest.raises(MachineError, match=f"4 ranks on this machine and {visible} visible GPUs"):
        gpu_index(0, local_size=4, visible=visible, per_task=per_task)
