"""Gate and guard of every optimizer: an update that is left out leaves every byte as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from dstrain.optim.build import build_optimizer
from dstrain.optim.config import OptimizerConfig
from dstrain.optim.fragment_optimizer import FragmentOptimizer
from dstrain.optim.groups import parameter_groups
from tests.support.layouts import layout_of_model

KINDS = pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "lamb", "muon"])


def tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def optimizer_for(model, *, guarded, **settings):
    config = OptimizerConfig(**settings)
    optimizer = build_optimizer(config, parameter_groups(model, config), guarded=guarded)
    if isinstance(optimizer, FragmentOptimizer):
        optimizer.bind(layout_of_model(model))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    return optimizer


def set_gradients(model, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def snapshot(model, optimizer):
    """Every byte a step may touch."""
    tensors = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value.clone() for value in state.values()]
    return tensors


def bitwise_equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in zip(one, other)
    )


# --- the guarded form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 5.0), (1.0, 1e-3), (0.0, 5.0), (0.25, 1.0)])
def test_guarded_steps_are_torchs_own_after_clip_grad_norm(clip_norm, scale):
    one, other = tiny_model(), tiny_model()
    guarded = optimizer_for(one, guarded=True, clip_norm=clip_norm)
    reference = optimizer_for(other, guarded=False)
    for step in range(4):
        set_gradients(one, scale=scale, seed=step)
        set_gradients(other, scale=scale, seed=step)
        norm = nn.utils.clip_grad_norm_(other.parameters(), clip_norm if clip_norm > 0 else math.inf)
        guarded.step()
        reference.step()
        assert guarded._global_grad_norm == norm.item()
        assert guarded.overflow is False
    assert bitwise_equal(snapshot(one, guarded), snapshot(other, reference))


@KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_touches_nothing_and_is_reported(kind, bad, place, clip_norm):
    model = tiny_model()
    optimizer = optimizer_for(model, guarded=True, clip_norm=clip_norm, kind=kind)
    set_gradients(model)
    optimizer.step()
    before = snapshot(model, optimizer)
    set_gradients(model, seed=1)
    list(model.parameters())[place].grad.view(-1)[0] = bad
    optimizer.step()
    assert optimizer.overflow is True
    assert not math.isfinite(optimizer._global_grad_norm)
    assert bitwise_equal(snapshot(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_too_large_for_their_norm_are_an_overflow_too():
    model = tiny_model()
    optimizer = optimizer_for(model, guarded=True)
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, scale=1e30)  # finite, but their squares are not
    optimizer.step()
    assert optimizer.overflow is True
    assert bitwise_equal([p.detach() for p in model.parameters()], before)


@KINDS
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(kind):
    one, other = tiny_model(), tiny_model()
    skipping, straight = (optimizer_for(model, guarded=True, kind=kind) for model in (one, other))
    for seed in (0, 1, 2):
        if seed == 1:
            set_gradients(one, scale=math.nan)
            skipping.step()
        for model, optimizer in ((one, skipping), (other, straight)):
            set_gradients(model, seed=seed)
            optimizer.step()
    assert skipping.overflow is False
    assert bitwise_equal(snapshot(one, skipping), snapshot(other, straight))


def test_parameters_without_gradient_are_left_alone():
    model = tiny_model()
    optimizer = optimizer_for(model, guarded=True)
    set_gradients(model)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert optimizer.overflow is False


def test_the_state_is_that_of_plain_adamw():
    model, other = tiny_model(), tiny_model()
    guarded, plain = optimizer_for(model, guarded=True), optimizer_for(other, guarded=False)
    set_gradients(model)
    guarded.step()
    plain.load_state_dict(copy.deepcopy(guarded.state_dict()))
    assert plain.state_dict()["state"].keys() == guarded.state_dict()["state"].keys()
    assert set(guarded.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


# --- the gate ------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("guarded", [True, False])
def test_a_closed_gate_touches_nothing_and_an_open_one_steps_as_without(kind, guarded):
    model = tiny_model()
    optimizer = optimizer_for(model, guarded=guarded, kind=kind)
    set_gradients(model)
    optimizer.step()
    before = snapshot(model, optimizer)
    optimizer.gate = lambda: False
    set_gradients(model, seed=1)
    optimizer.step()
    assert bitwise_equal(snapshot(model, optimizer), before)

    other = copy.deepcopy(model)
    free = optimizer_for(other, guarded=guarded, kind=kind)
    free.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.gate = lambda: True
    for some, its in ((model, optimizer), (other, free)):
        set_gradients(some, seed=2)
        its.step()
    assert bitwise_equal(snapshot(model, optimizer), snapshot(other, free))


def test_the_guarded_optimizer_knows_its_norm_before_clipping_when_it_asks():
    model = tiny_model()
    optimizer = optimizer_for(model, guarded=True, clip_norm=0.1)
    set_gradients(model)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    seen = []
    optimizer.gate = lambda: seen.append(optimizer._global_grad_norm) or True
    optimizer.step()
    assert seen == [pytest.approx(norm)]
    assert norm > 1


def test_the_guarded_optimizer_does_not_ask_about_what_it_refuses_itself():
    model = tiny_model()
    optimizer = optimizer_for(model, guarded=True)
    set_gradients(model, scale=float("inf"))
    optimizer.gate = lambda: pytest.fail("asked")
    optimizer.step()
    assert optimizer.overflow
