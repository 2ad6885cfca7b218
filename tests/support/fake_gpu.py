"""A GPU that is not there: tensors on "cuda" with shapes and types but without values, beside real ones on the host.

Within `fake_gpu()` an operation on such tensors runs torch's meta kernel, which knows shapes and types, forward and backward. Operands
on two devices and matrix products of two types fail, as they do on a GPU. What would make the host wait for the device raises
`HostWaitsError`: reading a value, a result whose size depends on values, a copy to the host, a blocking copy or one of unpinned
memory from it.

torch's FakeTensorMode cannot take its place in a CPU build: autograd asks for a device guard that only a CUDA build has, and
the host's own tensors lose their values. Here the device is "cuda" for Python and meta for autograd. Shows neither numbers nor
time, runs no CUDA kernel, and knows no autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_META = torch.device("meta")
_ATEN = torch.ops.aten
_OF_ONE_TYPE = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "dot", "linear"}
_READ_BY_HOST = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostWaitsError(AssertionError):
    """An operation would make the host wait for the GPU."""


class WrongOperandsError(AssertionError):
    """Operands that a GPU does not take together."""


class GpuTensor(Tensor):
    """Shape and type of a tensor on the GPU that is not there."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> GpuTensor:
        self: GpuTensor = torch.Tensor._make_subclass(
            cls, elem, elem.requires_grad, device_for_backend_keys=torch.device("cuda")
        )
        self.elem = elem
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def tolist(self) -> Any:
        raise HostWaitsError("tolist: the host needs values that only the GPU has")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Gpu(TorchDispatchMode):
    """Sends to the GPU what belongs there; everything else runs on the host, for real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_gpu = any(isinstance(leaf, GpuTensor) for leaf in tree_leaves((args, kwargs)))
        return _run(func, args, kwargs) if on_gpu or _is_gpu(kwargs.get("device")) else func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Within, "cuda" is a device."""
    lifted = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", _with_index(torch.Tensor.to)))
        stack.enter_context(mock.patch.object(torch, "tensor", _with_index(torch.tensor)))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then shows its copy
        stack.enter_context(_Gpu())
        yield


def moved(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with its parameters and buffers on the GPU, shared ones still shared; in place."""
    known: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            new = gpu(tensor, dtype if tensor.is_floating_point() else None)
            known[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return known[id(tensor)]

    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for name, tensor in values.items():
                if tensor is not None:
                    values[name] = there(tensor)  # type: ignore[assignment]
    return module


def gpu(tensor: Tensor, dtype: torch.dtype | None = None) -> GpuTensor:
    """A tensor of the same shape on the GPU."""
    return GpuTensor(torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta"))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if (reason := _wait(name, args, kwargs)) is not None:
        raise HostWaitsError(f"{func}: {reason}")
    if (reason := _mismatch(name, tensors, kwargs)) is not None:
        raise WrongOperandsError(f"{func}: {reason}")
    known = {id(t.elem): t for t in tensors if isinstance(t, GpuTensor)}
    meta_args, meta_kwargs = tree_map(_on_meta, (args, kwargs))
    if _is_gpu(meta_kwargs.get("device")):
        meta_kwargs["device"] = _META
    meta_kwargs.pop("pin_memory", None)
    try:
        found = func(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if "meta tensor" in str(error) or "data-dependent" in str(error):
            raise HostWaitsError(f"{func}: the host needs values that only the GPU has") from error
        raise
    return tree_map(lambda x: _on_gpu(x, known) if isinstance(x, Tensor) else x, found)


def _on_gpu(found: Tensor, known: dict[int, GpuTensor]) -> GpuTensor:
    return known[id(found)] if id(found) in known else GpuTensor(found)


def _wait(name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the host would wait for the device."""
    if name in _READ_BY_HOST:
        return "the host needs values that only the GPU has"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "the size of its result depends on values; give output_size"
    if name in _BY_INDEX:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, GpuTensor) for index in indices):
            return "indices on the host are copied first"
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask and (name == "index" or args[2].dim()):  # a number put where a mask says is filled in
            return "the size of its result depends on values"
    if name == "_to_copy":
        device = kwargs.get("device")
        return _copy(args[0], to_gpu=device is None or _is_gpu(device), blocking=not kwargs.get("non_blocking"))
    if name == "copy_":
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return _copy(args[1], to_gpu=isinstance(args[0], GpuTensor), blocking=blocking)
    return None


def _copy(source: Tensor, *, to_gpu: bool, blocking: bool) -> str | None:
    if isinstance(source, GpuTensor):
        return None if to_gpu else "a copy to the host"
    if not source.dim() and not getattr(source, "_pinned_here", False):
        return "a number of the host is copied while the host waits"
    if blocking:
        return "a blocking copy from the host"
    return None if getattr(source, "_pinned_here", False) else "a copy from memory that is not pinned"


def _mismatch(name: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> str | None:
    if name in ("_to_copy", "copy_"):
        return None
    if any(not isinstance(t, GpuTensor) and t.dim() for t in tensors):
        return f"operands on two devices: {tensors}"
    floats = {t.dtype for t in tensors if t.is_floating_point() and t.dim()}
    if name in _OF_ONE_TYPE and len(floats) > 1:
        return f"operands of types {floats}"
    return None


def _on_meta(value: Any) -> Any:
    if isinstance(value, GpuTensor):
        return value.elem
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) and value.dim() else value


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _pin(tensor: Tensor) -> Tensor:
    pinned = tensor.detach().clone()
    pinned._pinned_here = True  # type: ignore[attr-defined]
    return pinned


def _with_index(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with a number for "cuda": without one, torch asks a CUDA build which is the current device."""

    def indexed(*args: Any, **kwargs: Any) -> Tensor:
        args = tuple(GPU if isinstance(a, str | torch.device) and _is_gpu(a) else a for a in args)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = GPU
        return function(*args, **kwargs)

    return indexed
