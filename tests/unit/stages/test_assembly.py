"""What a rank finds out about itself before it meets the others, and that it tells them instead of leaving."""

from __future__ import annotations

import pytest
import torch

from dstrain.base.errors import MachineError, StorageError
from dstrain.base.world import World
from dstrain.health.start_config import StartConfig
from dstrain.stages import assembly
from dstrain.stages.assembly import open_site
from dstrain.train.ds_config import EngineConfig

OF_TWO = World(rank=1, size=2, local_rank=1, local_size=2)


class MetError(Exception):
    """The ranks meet, with this word."""


@pytest.fixture(autouse=True)
def meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(world, *, word, **_):
        raise MetError(word)

    monkeypatch.setattr(assembly, "start_processes", meet)
    monkeypatch.setattr(assembly, "take_up", lambda *_: pytest.skip("not reached in these tests"))


def word_of(world: World, **kwargs):
    with pytest.raises(MetError) as met, open_site(EngineConfig(), StartConfig(), world, **kwargs):
        pass
    return met.value.args[0]


@pytest.fixture
def broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nlong advice")

    monkeypatch.setattr(assembly, "choose_device", lambda _: "cuda")
    monkeypatch.setattr(assembly, "choose_precision", lambda *_, **__: "bf16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "zeros", broken)


@pytest.mark.usefixtures("broken_gpu")
def test_a_gpu_that_does_not_answer_is_told_before_the_first_collective():
    """NCCL would wait for this rank: `set_device` alone touches nothing."""
    word = word_of(OF_TWO)
    assert word.code == 77
    assert word.fault.startswith("GPU 1 of this machine cannot be used (CUDA error: CUDA-capable device(s) is/are busy")
    assert "long advice" not in word.fault


@pytest.mark.usefixtures("broken_gpu")
def test_a_rank_alone_just_fails():
    with pytest.raises(MachineError, match="GPU 0"), open_site(EngineConfig(), StartConfig(), World()):
        pass


@pytest.mark.usefixtures("broken_gpu")
def test_a_fault_from_before_is_the_one_that_is_told():
    word = word_of(OF_TWO, fault=StorageError("/run: cannot be written"))
    assert (word.fault, word.code) == ("/run: cannot be written", 76)
