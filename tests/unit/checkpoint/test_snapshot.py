"""The buffer is the file: safetensors reads it, its bytes do not follow the tensors, and it is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from dstrain.base.errors import CheckpointError
from dstrain.checkpoint.manifest import Fragment, fragment_key
from dstrain.checkpoint.snapshot import Snapshot
from tests.support.tiny_checkpoints import fragments_of, state_of


def taken(fragments: list[Fragment]) -> tuple[Snapshot, bytes]:
    snapshot = Snapshot()
    snapshot.take(fragments)
    data = b"".join(snapshot.pieces(7))
    assert len(data) == snapshot.size_bytes
    return snapshot, data


@given(sizes=st.lists(st.integers(1, 50), max_size=8), seed=st.integers(0, 9))
def test_safetensors_reads_every_fragment_back_bit_for_bit(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fragments = [Fragment(f"p{i}.é", "fp32", 3 * i, torch.randn(n, generator=generator)) for i, n in enumerate(sizes)]
    snapshot, data = taken(fragments)
    found = load(data)
    assert snapshot.listing == tuple((f.name, f.state, f.offset, f.tensor.numel()) for f in fragments)
    assert found.keys() == {fragment_key(f.name, f.state, f.offset) for f in fragments}
    for f in fragments:
        assert torch.equal(found[fragment_key(f.name, f.state, f.offset)].view(torch.int32), f.tensor.view(torch.int32))


def test_what_changes_after_the_copy_is_not_saved() -> None:
    tensors = state_of(1)
    fragments = list(fragments_of(tensors))
    snapshot, data = taken(fragments)
    for tensor in tensors.values():
        tensor.zero_()
    assert b"".join(snapshot.pieces(1000)) == data


def test_the_buffer_is_used_again_and_a_new_layout_makes_a_new_one() -> None:
    snapshot = Snapshot()
    snapshot.take(fragments_of(state_of(1)))
    address = snapshot.address
    snapshot.take(fragments_of(state_of(2)))
    assert snapshot.address == address
    assert b"".join(snapshot.pieces(64)) == taken(list(fragments_of(state_of(2))))[1]
    snapshot.take(fragments_of(state_of(2), parts=3))
    assert b"".join(snapshot.pieces(64)) == taken(list(fragments_of(state_of(2), parts=3)))[1]


def test_tensors_begin_on_a_cache_line() -> None:
    _, data = taken(list(fragments_of(state_of(1))))
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2), torch.zeros(())])
def test_what_is_not_flat_fp32_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="w exp_avg: a fragment is a flat fp32 tensor"):
        Snapshot().take([Fragment("w", "exp_avg", 0, tensor)])


def test_two_fragments_at_one_place_are_refused() -> None:
    with pytest.raises(CheckpointError, match="begin at the same element"):
        Snapshot().take([Fragment("w", "fp32", 0, torch.zeros(2)), Fragment("w", "fp32", 0, torch.zeros(3))])


def test_memory_that_is_not_there_is_a_fault_with_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot()
    snapshot.take(fragments_of(state_of(1)))

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: refuse() if k else torch.tensor([]))
        with pytest.raises(CheckpointError, match="no host memory for a copy"):
            snapshot.take([Fragment("w", "fp32", 0, torch.ones(5))])
    snapshot.take(fragments_of(state_of(1)))
    assert b"".join(snapshot.pieces(64)) == taken(list(fragments_of(state_of(1))))[1], "the next save has its buffer"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_fragments_land_in_pinned_memory_after_what_the_training_stream_has_queued(tmp_path: Path) -> None:
    tensor = torch.zeros(50_000_000, device="cuda")
    snapshot = Snapshot()
    snapshot.take([Fragment("w", "fp32", 0, tensor), Fragment("w", "exp_avg", 0, tensor)])
    address = snapshot.address
    assert snapshot._body.is_pinned()
    for value in range(1, 4):
        for _ in range(50):  # work that is still queued when the copy is asked for
            tensor.mul_(1.0)
        tensor.fill_(float(value))
        snapshot.take([Fragment("w", "fp32", 0, tensor), Fragment("w", "exp_avg", 0, tensor)])
        tensor.fill_(-1.0)  # queued after the copy has ended
        found = load(b"".join(snapshot.pieces(1 << 24)))
        assert all(bool((t == value).all()) for t in found.values())
        assert snapshot.address == address
