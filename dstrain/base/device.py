"""Which device and precision this process trains on, decided once, before any engine is imported.

DeepSpeed picks its accelerator when it is imported and falls back to the CPU in silence when a driver is broken; here the
choice is explicit, and a run that asks for GPUs and finds none is an error (docs/deepspeed.md).
"""

from __future__ import annotations

import os
import platform
from typing import Literal

import torch
from torch import Tensor

from dstrain.base.errors import MachineError

DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["bf16", "fp32", "fp16"]


def choose_device(wanted: DeviceChoice) -> str:
    """Return "cpu" or "cuda" and tell DeepSpeed, through DS_ACCELERATOR, before it is imported.

    Raises:
        MachineError: cuda is asked for and no GPU is visible.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise MachineError(
            "engine.device: cuda is asked for and this process sees no GPU "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); "
            "check nvidia-smi and that torch is a CUDA build, or set engine.device: cpu"
        )
    device = "cpu" if wanted == "cpu" or not available else "cuda"
    os.environ["DS_ACCELERATOR"] = device
    return device


def gpu_index(local_rank: int, *, local_size: int, visible: int, per_task: bool) -> int:
    """Which of the GPUs that a rank sees is its own.

    Args:
        local_rank: the rank's number on its machine.
        local_size: ranks on it.
        visible: GPUs that this process sees.
        per_task: whether the launcher may show each rank its own GPU only (srun with --gpus-per-task or --gpu-bind).

    Raises:
        MachineError: there are fewer GPUs than ranks; NCCL would fail later with "Duplicate GPU detected".
    """
    if visible >= local_size:
        return local_rank
    if visible == 1 and per_task:
        return 0
    raise MachineError(
        f"{local_size} ranks on this machine and {visible} visible GPUs "
        f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): start one rank for each GPU"
    )


def choose_precision(wanted: str, *, device: str) -> Precision:
    """Resolve "auto" to bf16 where the hardware multiplies it natively, else fp32.

    Raises:
        MachineError: fp16 is asked for on a CPU.
    """
    if wanted == "fp16" and device == "cpu":
        raise MachineError("engine.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if wanted in ("bf16", "fp32", "fp16"):
        return wanted  # type: ignore[return-value]
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512_BF16 or AMX on x86, BF16 on Arm)."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if check is not None and check():
        return True
    if platform.machine() == "aarch64":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                return " bf16" in file.read()
        except OSError:
            return False
    return False


def gpu_capability(device: str) -> tuple[int, int] | None:
    """Compute capability of this process's GPU; None on a CPU, and where a run for GPUs is only planned."""
    return torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device; a GPU's copy is queued from pinned memory, and the host does not wait for it."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def device_name(device: str) -> str:
    """The marketing name of the accelerator or processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
