"""The fused head against logits, softmax and autograd in float64, chunk by chunk and dtype by dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dstrain.base.protocols import IGNORED_LABEL
from dstrain.objectives.linear_cross_entropy import LinearCrossEntropy, score_logits

WIDTH = 6


def inputs(rows: int, vocab: int, *, bias: bool, ignored: int, seed: int = 0) -> tuple[list[Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor | None] = [
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * 2,
        torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64),
        torch.randn(vocab, generator=generator, dtype=torch.float64) if bias else None,
    ]
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[:ignored] = IGNORED_LABEL
    return tensors, labels


def reference(tensors: list[Tensor | None], labels: Tensor, *, factor: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    logits = functional.linear(*leaves)  # type: ignore[arg-type]
    loss = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
    (loss * factor).backward()  # type: ignore[no-untyped-call]
    hits = (logits.argmax(-1) == labels).sum().float()
    return loss.detach(), hits, [leaf.grad for leaf in leaves if leaf is not None]  # type: ignore[misc]


def fused(
    head: LinearCrossEntropy, tensors: list[Tensor | None], labels: Tensor, *, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    loss, hits = head(*leaves, labels)  # type: ignore[arg-type]
    (loss * factor).backward()  # type: ignore[no-untyped-call]
    return loss.detach(), hits, [leaf.grad for leaf in leaves if leaf is not None]  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300), vocab=st.integers(2, 40), bias=st.booleans(), ignored=st.integers(0, 3),
    chunk=st.sampled_from([1, 64 * 4 * 3, 1 << 30]), factor=st.sampled_from([1.0, -0.25, 3e-4]),
)  # fmt: skip
def test_loss_hits_and_gradients_are_those_of_the_logits(
    rows: int, vocab: int, bias: bool, ignored: int, chunk: int, factor: float
) -> None:
    tensors, labels = inputs(rows, vocab, bias=bias, ignored=min(ignored, rows))
    loss, hits, gradients = reference(tensors, labels, factor=factor)
    head = LinearCrossEntropy(chunk_bytes=chunk)
    found, found_hits, found_gradients = fused(head, tensors, labels, factor=factor, dtype=torch.float32)
    torch.testing.assert_close(found, loss.float(), rtol=2e-6, atol=2e-5)
    assert found_hits == hits
    for one, other in zip(found_gradients, gradients):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=2e-6)


def test_a_head_serves_batches_of_any_size_and_vocabulary_one_after_the_other() -> None:
    head = LinearCrossEntropy(chunk_bytes=64 * 4 * 7)
    for rows, vocab in ((130, 7), (3, 7), (400, 7), (65, 11), (1, 3)):
        tensors, labels = inputs(rows, vocab, bias=True, ignored=0, seed=rows)
        loss, hits, gradients = reference(tensors, labels, factor=1.0)
        found, found_hits, found_gradients = fused(head, tensors, labels, factor=1.0, dtype=torch.float32)
        torch.testing.assert_close(found, loss.float(), rtol=2e-6, atol=2e-5)
        assert found_hits == hits
        torch.testing.assert_close(found_gradients[1], gradients[1].float(), rtol=1e-4, atol=2e-6)


def test_two_losses_may_wait_for_their_backward_passes_at_the_same_time() -> None:
    head = LinearCrossEntropy()
    first, second = (inputs(80, 9, bias=True, ignored=0, seed=seed) for seed in (1, 2))
    leaves = [[None if t is None else t.float().requires_grad_() for t in tensors] for tensors, _ in (first, second)]
    losses = [head(*own, labels)[0] for own, (_, labels) in zip(leaves, (first, second))]  # type: ignore[arg-type]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    for own, (tensors, labels) in zip(leaves, (first, second)):
        for leaf, expected in zip(own, reference(tensors, labels, factor=1.0)[2]):
            torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=2e-6)  # type: ignore[union-attr]


def test_bf16_is_as_good_as_logits_in_bf16() -> None:
    tensors, labels = inputs(200, 50, bias=True, ignored=2)
    exact = reference(tensors, labels, factor=1.0)
    low = [None if t is None else t.bfloat16().requires_grad_() for t in tensors]
    plain, _ = score_logits(functional.linear(*low), labels)  # type: ignore[arg-type]
    plain.backward()  # type: ignore[no-untyped-call]
    _, _, found = fused(LinearCrossEntropy(chunk_bytes=64 * 4 * 50), tensors, labels, factor=1.0, dtype=torch.bfloat16)
    for gradient, leaf, true in zip(found, low, exact[2]):
        assert gradient.dtype == torch.bfloat16
        ours, theirs = ((g.double() - true).norm() for g in (gradient, leaf.grad))  # type: ignore[union-attr]
        assert ours <= 1.2 * theirs


def test_huge_logits_give_finite_losses() -> None:
    hidden = torch.full((70, WIDTH), 1e4)
    weight = torch.linspace(-1, 1, 5)[:, None].expand(5, WIDTH).contiguous()
    loss, hits = LinearCrossEntropy()(hidden, weight, None, torch.full((70,), 4))
    assert loss.item() == 0.0
    assert hits.item() == 70


def test_without_gradients_nothing_is_kept() -> None:
    tensors, labels = inputs(70, 9, bias=True, ignored=0)
    with torch.no_grad():
        loss, _ = LinearCrossEntropy()(*(t if t is None else t.float() for t in tensors), labels)  # type: ignore[arg-type]
    assert not loss.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    tensors, labels = inputs(70, 9, bias=False, ignored=0)
    leaves = [None if t is None else t.float().requires_grad_() for t in tensors]
    loss, _ = LinearCrossEntropy()(*leaves, labels)  # type: ignore[arg-type]
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_fp16_keeps_its_logits_so_that_the_loss_scale_reaches_small_gradients() -> None:
    tensors, labels = inputs(3, 9, bias=True, ignored=0)
    loss, _, gradients = fused(LinearCrossEntropy(), tensors, labels, factor=1024.0, dtype=torch.float16)
    exact = reference(tensors, labels, factor=1024.0)
    torch.testing.assert_close(loss, exact[0].float(), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(gradients[0].double(), exact[2][0], rtol=2e-2, atol=2.0)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 9830])
def test_chunks_are_even_whole_tiles(rows: int) -> None:
    head = LinearCrossEntropy(chunk_bytes=1000 * 4 * 200)
    size = head.rows_at_once(rows, 1000, torch.device("cpu"))
    assert size == rows or size % 64 == 0
    assert size <= 256
    count = -(-rows // size)
    assert rows - (count - 1) * size > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_in_the_type_of_a_linear_layer(hidden: torch.dtype, dtype: torch.dtype) -> None:
    tensors, labels = inputs(70, 9, bias=True, ignored=1)
    expected, expected_hits, _ = fused(LinearCrossEntropy(), tensors, labels, factor=1.0, dtype=dtype)
    states, weight, bias = (t.float().requires_grad_() for t in tensors if t is not None)
    with torch.autocast("cpu", dtype):
        loss, hits = LinearCrossEntropy(chunk_bytes=64 * 4 * 9)(states.to(hidden), weight, bias, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert weight.grad is not None
    assert states.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-2)
    assert abs(hits - expected_hits) <= 1
