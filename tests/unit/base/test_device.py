import os
import platform

import pytest
import torch

from dstrain.base import device as device_module
from dstrain.base.device import choose_device, choose_precision, cpu_has_bf16, device_name
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
