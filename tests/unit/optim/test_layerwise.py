"""StableAdamW and LAMB against the papers' algorithms written out, on whole parameters and on flat partitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.optim.fragment_optimizer import FragmentOptimizer
from dstrain.optim.layout import Layout, Piece
from tests.support.layouts import flattened

SHAPES = ((4, 3), (5,), (2, 6), (1,))
SETTINGS: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "moments": ("exp_avg", "exp_avg_sq"),
}
RATE, STEPS = 0.05, 7


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    """The size jumps, so that second moments lag behind."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * (30.0 if step == 4 else 0.3) for shape in SHAPES]


def whole(rule: str, *, adapted: bool = True) -> list[Tensor]:
    parameters = [w.clone().requires_grad_() for w in weights()]
    layout = Layout(
        names=("a", "b", "c", "d"), shapes=SHAPES,
        pieces={p: (Piece(n, 0, 0, p.numel()),) for n, p in enumerate(parameters)},
        members={p: (n,) for n, p in enumerate(parameters)}, held=((),), rank=0, replicated=True,
    )  # fmt: skip
    optimizer = FragmentOptimizer([{"params": parameters, "rule": rule, "adapted": adapted, **SETTINGS}])
    optimizer.bind(layout)
    optimizer.param_groups[0]["lr"] = RATE
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(step)):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in parameters]


def in_flat_partitions(rule: str, *, padding: int) -> list[Tensor]:
    flat, layout = flattened(weights(), padding=padding)
    optimizer = FragmentOptimizer([{"params": [flat], "rule": rule, "adapted": True, **SETTINGS}])
    optimizer.bind(layout)
    optimizer.param_groups[0]["lr"] = RATE
    for step in range(STEPS):
        flat.grad = torch.cat([*(g.reshape(-1) for g in gradients(step)), torch.zeros(padding)])
        optimizer.step()
    assert not flat.detach()[flat.numel() - padding :].any(), "padding stays what it is"
    sizes = [math.prod(shape) for shape in SHAPES]
    return [x.view(shape) for x, shape in zip(torch.split(flat.detach()[: sum(sizes)], sizes), SHAPES)]


def stable_adamw_of_the_paper() -> list[Tensor]:
    """arXiv 2304.13013, algorithm 2, with its debiased betas instead of corrected moments."""
    (b1, b2), eps, decay = SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    found = [w.double() for w in weights()]
    v, u = [torch.zeros_like(w) for w in found], [torch.zeros_like(w) for w in found]
    for t in range(1, STEPS + 1):
        beta1, beta2 = b1 * (1 - b1 ** (t - 1)) / (1 - b1**t), b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        for i, gradient in enumerate(g.double() for g in gradients(t - 1)):
            v[i] = beta1 * v[i] + (1 - beta1) * gradient
            u[i] = beta2 * u[i] + (1 - beta2) * gradient**2
            rms = (gradient**2 / u[i].clamp(min=eps**2)).mean().sqrt()
            rate = RATE / max(1.0, float(rms))
            found[i] = found[i] - rate * decay * found[i] - rate * v[i] / (u[i].sqrt() + eps)
    return found


def lamb_of_the_paper(*, adapted: bool) -> list[Tensor]:
    """arXiv 1904.00962, algorithm 2."""
    (b1, b2), eps, decay = SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    found = [w.double() for w in weights()]
    m, v = [torch.zeros_like(w) for w in found], [torch.zeros_like(w) for w in found]
    for t in range(1, STEPS + 1):
        for i, gradient in enumerate(g.double() for g in gradients(t - 1)):
            m[i] = b1 * m[i] + (1 - b1) * gradient
            v[i] = b2 * v[i] + (1 - b2) * gradient**2
            r = m[i] / (1 - b1**t) / ((v[i] / (1 - b2**t)).sqrt() + eps) + decay * found[i]
            trust = found[i].norm() / r.norm() if adapted else 1.0
            found[i] = found[i] - RATE * trust * r
    return found


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=2e-5, atol=2e-6)


def test_stable_adamw_is_the_papers() -> None:
    close(whole("stable_adamw"), stable_adamw_of_the_paper())


def test_stable_adamw_takes_a_smaller_step_than_adamw_where_gradients_jump() -> None:
    assert sum((a - b).abs().max() > 1e-3 for a, b in zip(whole("stable_adamw"), whole("adamw"))) == len(SHAPES)


@pytest.mark.parametrize("adapted", [True, False])
def test_lamb_is_the_papers_and_adams_where_it_does_not_adapt(adapted: bool) -> None:
    close(whole("lamb", adapted=adapted), lamb_of_the_paper(adapted=adapted))
    assert (whole("adamw")[0] - whole("lamb", adapted=True)[0]).abs().max() > 1e-2


def test_a_parameter_of_zeros_takes_adams_step_under_lamb() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    layout = Layout(("a",), ((3,),), {parameter: (Piece(0, 0, 0, 3),)}, {parameter: (0,)}, ((),), 0, True)
    optimizer = FragmentOptimizer([{"params": [parameter], "rule": "lamb", "adapted": True, **SETTINGS}])
    optimizer.bind(layout)
    optimizer.param_groups[0]["lr"] = RATE
    parameter.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -RATE * parameter.grad.sign(), rtol=1e-4, atol=0.0)


def test_adamw_in_these_words_is_torchs() -> None:
    parameters = [w.clone().requires_grad_() for w in weights()]
    reference = torch.optim.AdamW(parameters, lr=RATE, betas=SETTINGS["betas"], eps=SETTINGS["eps"], weight_decay=0.1)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(step)):
            parameter.grad = gradient
        reference.step()
    close(whole("adamw"), [p.detach() for p in parameters])


@pytest.mark.parametrize("rule", ["adamw", "stable_adamw", "lamb"])
@pytest.mark.parametrize("padding", [0, 5])
def test_flat_partitions_give_the_parameters_that_whole_tensors_give(rule: str, padding: int) -> None:
    close(in_flat_partitions(rule, padding=padding), whole(rule))
