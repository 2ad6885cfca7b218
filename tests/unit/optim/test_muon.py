"""Muon against torch's, and the exchange of parts: every element of a matrix reaches its owner once, and comes back."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dstrain.optim.fragment_optimizer import FragmentOptimizer
from dstrain.optim.layout import Layout
from dstrain.optim.muon import matrices_of, newton_schulz, orthogonalised, plan_exchange, update_scale
from tests.support.layouts import flattened

SETTINGS: dict[str, Any] = {
    "rule": "muon", "moments": ("momentum_buffer",), "momentum": 0.95, "nesterov": True, "newton_schulz_steps": 5,
    "scale": "match_rms_adamw", "split_qkv": True, "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 6), (4, 11), (11, 4), (1, 5)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_steps_are_torchs_muon(shape: tuple[int, int], nesterov: bool, scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    reference = start.clone().requires_grad_()
    theirs = torch.optim.Muon(
        [reference], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=scale
    )  # fmt: skip
    flat, layout = flattened([start], padding=3)
    ours = FragmentOptimizer([{"params": [flat], **SETTINGS, "nesterov": nesterov, "scale": scale}])
    ours.bind(layout)
    ours.param_groups[0]["lr"] = 0.02
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        reference.grad, flat.grad = gradient.clone(), torch.cat([gradient.reshape(-1), torch.zeros(3)])
        theirs.step()
        ours.step()
    found = flat.detach()[: start.numel()].view(shape)
    assert not torch.equal(found, start)
    # torch's iteration is in bfloat16 (8 bits), ours on a CPU in float32
    step_size = 0.02 * update_scale(scale, *shape)
    assert float((found - reference.detach()).abs().max()) < 0.1 * step_size
    assert not flat.detach()[start.numel() :].any()


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_orthogonalising_moves_singular_values_near_one_and_keeps_the_vectors(
    rows: int, columns: int, seed: int
) -> None:
    u, _, v = torch.linalg.svd(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), full_matrices=False
    )
    singular = torch.linspace(1.0, 2.0, min(rows, columns))
    found = newton_schulz((u @ torch.diag(singular) @ v)[None], steps=5)[0]
    inside = u.T @ found @ v.T  # diagonal where the singular vectors are kept
    values = inside.diagonal()
    torch.testing.assert_close(inside, torch.diag(values), atol=1e-4, rtol=0.0)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not newton_schulz(torch.zeros(1, 4, 4), steps=5).any()


def test_matrices_of_one_shape_give_together_what_each_gives_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    some = {n: torch.randn(shape, generator=generator) for n, shape in enumerate([(3, 5), (5, 3), (3, 5), (4, 4)])}
    together = orthogonalised(some, steps=5)
    assert sorted(together) == sorted(some)
    for number, matrix in some.items():
        torch.testing.assert_close(together[number], newton_schulz(matrix[None], steps=5)[0], rtol=1e-4, atol=1e-5)


def test_the_scales_are_the_papers() -> None:
    assert update_scale("match_rms_adamw", 100, 25) == pytest.approx(0.2 * 10)
    assert update_scale("match_rms_adamw", 25, 100) == pytest.approx(0.2 * 10)
    assert update_scale("original", 100, 25) == pytest.approx(2.0)
    assert update_scale("original", 25, 100) == 1.0


def test_an_update_has_the_root_mean_square_of_adamws() -> None:
    """0.2 to 0.4 for AdamW (arXiv 2502.16982, section 2.2)."""
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    found = newton_schulz(matrix[None], steps=5)[0] * update_scale("match_rms_adamw", 64, 256)
    assert 0.15 < float(found.square().mean().sqrt()) < 0.25


def test_a_fused_query_key_value_matrix_counts_as_three() -> None:
    fused = matrices_of("layers.0.attn.Wqkv.weight", (12, 4), 7, split_qkv=True)
    assert [(m.parameter, m.first, m.rows, m.columns) for m in fused] == [(7, 0, 4, 4), (7, 16, 4, 4), (7, 32, 4, 4)]
    one = [("a.Wqkv.weight", (12, 4), False), ("a.Wi.weight", (12, 4), True), ("a.Wqkv.weight", (8, 4), True)]
    for name, shape, split in one:
        assert [(m.rows, m.columns) for m in matrices_of(name, shape, 0, split_qkv=split)] == [shape]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    fused=st.booleans(),
)
def test_every_element_reaches_its_matrixs_owner_once_and_every_holder_gets_its_own_back(
    shapes: list[tuple[int, int]], cuts: list[float], fused: bool
) -> None:
    shapes = [(3 * c if fused else r, c) for r, c in shapes]
    sizes = [r * c for r, c in shapes]
    ends = list(itertools.accumulate(sizes))
    borders = [0, *sorted(int(cut * ends[-1]) for cut in cuts), ends[-1]]
    held = []
    for first, last in itertools.pairwise(borders):
        spans = [(n, max(first, end - size) - (end - size), min(last, end) - max(first, end - size))
                 for n, (end, size) in enumerate(zip(ends, sizes))]  # fmt: skip
        held.append(tuple(span for span in spans if span[2] > 0))
    layout = Layout(
        names=tuple(f"{n}.qkv.weight" for n in range(len(shapes))), shapes=tuple(shapes), pieces={}, members={},
        held=tuple(held), rank=0, replicated=False,
    )  # fmt: skip
    plan = plan_exchange(layout, range(len(shapes)), split_qkv=fused)
    ranks = range(len(held))
    assert len(plan.matrices) == (3 if fused else 1) * len(shapes)
    for owner in ranks:
        arriving = [p for source in ranks for p in plan.gathered(source, owner, replicated=False)]
        for number, matrix in enumerate(plan.matrices):
            found = sorted((p.begin, p.begin + p.numel) for p in arriving if p.matrix == number)
            once = [begin for begin, _ in found] == [0, *(end for _, end in found)][: len(found)]
            assert once
            assert sum(end - begin for begin, end in found) == (matrix.numel if plan.owners[number] == owner else 0)
    for holder in ranks:
        back = [p for owner in ranks for p in plan.returned(owner, holder)]
        assert sum(p.numel for p in back) == sum(numel for *_, numel in held[holder])


def test_the_work_is_shared_out_evenly() -> None:
    layout = Layout(tuple("abcdefgh"), ((8, 8),) * 8, {}, {}, ((), (), (), ()), 0, True)
    plan = plan_exchange(layout, range(8), split_qkv=False)
    assert sorted(plan.owners) == [0, 0, 1, 1, 2, 2, 3, 3]
