"""What the GPU that is not there finds, so that the tests on it prove something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.fake_gpu import GPU, GpuTensor, HostWaitsError, WrongOperandsError, fake_gpu, moved
from tests.support.tiny_models import tiny_encoder

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "truth": lambda x: bool(x.isfinite().all()),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "onto the host": lambda x: torch.zeros(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked values": lambda x: x.index_put_((x > 0,), torch.zeros(2, device="cuda")),
    "index on the host": lambda x: x[torch.tensor([0, 2])],
    "list": lambda x: x[[0, 2]],
    "repeats": lambda x: torch.repeat_interleave(x, torch.arange(3, device="cuda")),
    "tensor of numbers": lambda x: torch.tensor([1.0, 2.0, 3.0], device="cuda"),
    "tensor like": lambda x: torch.tensor([1.0], device=x.device),
    "blocking copy": lambda x: torch.zeros(3).pin_memory().to("cuda"),
    "unpinned copy": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "copy into": lambda x: x.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_is_an_error(name: str) -> None:
    with fake_gpu(), pytest.raises(HostWaitsError):
        WAITS[name](torch.zeros(3, device="cuda"))


def test_operands_on_two_devices_or_of_two_types_are_errors() -> None:
    with fake_gpu():
        x = torch.zeros(3, 3, device="cuda")
        with pytest.raises(WrongOperandsError, match="two devices"):
            x + torch.zeros(3, 3)
        with pytest.raises(WrongOperandsError, match="types"):
            x @ x.bfloat16()
        assert (x + torch.tensor(1.0)).device == GPU  # a number goes with the kernel's arguments


def test_what_needs_no_waiting_works() -> None:
    with fake_gpu():
        x = torch.zeros(4, device="cuda", requires_grad=True)
        sent = torch.arange(4).pin_memory().to("cuda", non_blocking=True)
        y = torch.repeat_interleave(x[sent], sent, output_size=6) * 2.0
        y.masked_fill(y > 0, 0.0).sum().backward()
        assert isinstance(x.grad, GpuTensor)
        assert x.grad.shape == (4,)
        assert torch.zeros(3)[torch.tensor([True, False, True])].tolist() == [0.0, 0.0]  # the host's own are real
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").device.type == "cuda"


def test_shared_weights_stay_shared() -> None:
    model = moved(tiny_encoder(), torch.bfloat16)
    embedding = model.model.model["embeddings"]["tok_embeddings"].weight  # type: ignore[union-attr,index]
    assert model.model.decoder.weight is embedding  # type: ignore[union-attr]
    assert (embedding.device, embedding.dtype) == (GPU, torch.bfloat16)
