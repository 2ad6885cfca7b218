"""Micro-batches survive the trip to the device bit for bit, in the order they were given."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.protocols import MicroBatch
from dstrain.train.device_feed import DeviceFeed, compact, spelled_out
from tests.support.fake_gpu import GPU, fake_gpu
from tests.support.tiny_models import documents, packed

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


def equal(one: MicroBatch, other: MicroBatch) -> bool:
    for field in dataclasses.fields(MicroBatch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            if left.dtype != right.dtype or not torch.equal(left.cpu(), right.cpu()):
                return False
        elif left != right:
            return False
    return True


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).map(tuple), top=st.sampled_from([60, 40_000, 250_000]),
    types=st.booleans(),
)  # fmt: skip
def test_compact_micro_batches_are_spelled_out_as_they_were(lengths: tuple[int, ...], top: int, types: bool) -> None:
    batch = packed(documents(lengths))
    tokens = batch.tokens * 1000 % top
    tokens[-1] = top - 1
    batch = dataclasses.replace(
        batch, tokens=tokens, labels=tokens, token_types=(tokens % 2) if types else None, num_targets=len(tokens)
    )
    assert equal(spelled_out(compact(batch)), batch)


def test_a_token_travels_in_two_bytes_and_a_target_in_eight() -> None:
    batch = packed(documents((512,)), targets=torch.arange(0, 512, 7))
    sent = compact(batch)
    size = sum(t.numel() * t.element_size() for t in (sent.tokens, sent.positions, sent.targets, sent.labels))
    assert size == 2 * 512 + 4 + 8 * len(batch.targets)


def test_numbers_to_regress_stay_numbers() -> None:
    batch = dataclasses.replace(packed(documents((5,))), labels=torch.tensor([0.5, -100.0, 1.0, 2.0, 3.25]))
    assert equal(spelled_out(compact(batch)), batch)


def test_on_a_cpu_nothing_is_copied() -> None:
    batches = [packed(documents((n,))) for n in (5, 6, 7)]
    found = list(DeviceFeed("cpu")(batches))
    assert all(one is other for one, other in zip(found, batches))


def test_every_micro_batch_is_shaped_once() -> None:
    seen = []

    def shape(batch: MicroBatch) -> MicroBatch:
        seen.append(batch.num_tokens)
        return batch

    list(DeviceFeed("cpu", shape=shape)([packed(documents((n,))) for n in (5, 6, 7)]))
    assert seen == [5, 6, 7]


@on_a_gpu
def test_a_gpu_gets_the_same_micro_batches_in_order() -> None:
    batches = [packed(documents((n, 3))) for n in range(4, 40)]
    for sent, received in zip(batches, DeviceFeed("cuda")(batches)):
        assert received.tokens.device.type == "cuda"
        assert equal(sent, received)


class Streams:
    """CUDA's streams and events as far as a feed uses them, and what the computing stream has to wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent, self.waited, self.recorded = 0, 0, 0
        streams, here = self, contextlib.nullcontext

        class Event:
            def record(self, stream: object) -> None:
                streams.sent += 1
                self.number = streams.sent

        class Stream:
            def wait_stream(self, other: object) -> None:
                streams.waited = streams.sent

            def wait_event(self, event: Event) -> None:
                streams.waited = max(streams.waited, event.number)

        def record_stream(tensor: torch.Tensor, stream: object) -> None:
            streams.recorded += 1

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: here())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)


def test_the_copy_of_the_next_micro_batch_is_begun_before_and_waited_for_after_the_present_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams(monkeypatch)
    batches = [packed(documents((n, 3))) for n in (4, 5, 6)]
    with fake_gpu():
        for number, (received, given) in enumerate(zip(DeviceFeed("cuda")(batches), batches), 1):
            assert received.tokens.device == received.positions.device == received.labels.device == GPU
            assert received.tokens.shape == received.positions.shape == given.tokens.shape
            assert received.tokens.dtype == received.targets.dtype == torch.int64
            assert (streams.sent, streams.waited) == (min(number + 1, 3), number)
            assert streams.recorded == 4 * number  # tokens, lengths, targets and labels are not freed too early
