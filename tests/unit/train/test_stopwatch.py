"""Time on the device, added up over pieces."""

from __future__ import annotations

import pytest
import torch

from dstrain.train import stopwatch
from dstrain.train.stopwatch import Stopwatch


def test_pieces_add_up_and_what_lies_between_does_not_count(monkeypatch):
    instants = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(instants))
    watch = Stopwatch("cpu")
    with watch:
        pass
    with watch:
        pass
    assert watch.seconds() == 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_the_device_is_timed_not_the_call():
    a = torch.randn(4096, 4096, device="cuda")
    watch = Stopwatch("cuda")
    with watch:
        for _ in range(20):
            a = a @ a
    torch.cuda.synchronize()
    assert watch.seconds() > 0.001
