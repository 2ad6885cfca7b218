"""Which class serves which kind; the rest is in the twins of the classes."""

import dataclasses

import pytest
import torch

from dstrain.optim.adamw import GatedAdamW, GuardedAdamW
from dstrain.optim.build import OPTIMIZERS, build_optimizer
from dstrain.optim.config import OptimizerConfig
from dstrain.optim.fragment_optimizer import FragmentOptimizer, GuardedFragmentOptimizer
from dstrain.optim.groups import parameter_groups
from dstrain.optim.layout import Layout
from tests.support.fake_gpu import HostWaitsError, fake_gpu, gpu, moved
from tests.support.layouts import flattened, layout_of_model
from tests.support.tiny_models import tiny_encoder, tiny_model


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "lamb", "muon"])
def test_every_kind_is_built_and_is_among_those_deepspeed_is_told_of(kind: str, guarded: bool) -> None:
    config = OptimizerConfig(kind=kind, clip_norm=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, parameter_groups(tiny_model("bert"), config), guarded=guarded)
    wanted = (GatedAdamW, GuardedAdamW) if kind == "adamw" else (FragmentOptimizer, GuardedFragmentOptimizer)
    assert type(optimizer) is wanted[guarded]
    assert type(optimizer) in OPTIMIZERS
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "lamb", "muon"])
def test_no_update_of_whole_parameters_waits_for_a_gpu(kind: str) -> None:
    model = moved(tiny_encoder())
    config = OptimizerConfig(kind=kind, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, parameter_groups(model, config), guarded=False)
    if isinstance(optimizer, FragmentOptimizer):
        optimizer.bind(layout_of_model(model))
    with fake_gpu():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("kind", ["stable_adamw", "lamb", "muon"])
def test_no_update_of_flat_partitions_waits_for_a_gpu(kind: str) -> None:
    config = OptimizerConfig(kind=kind, weight_decay=0.1)  # type: ignore[arg-type]
    groups = parameter_groups(tiny_encoder(), config)
    tensors, names, pieces, members, shapes = [], [], {}, {}, []
    for group in groups:
        flat, layout = flattened(group["params"], padding=3)
        tensor = gpu(flat).requires_grad_()
        group["params"] = [tensor]
        first = len(shapes)
        pieces[tensor] = tuple(dataclasses.replace(p, parameter=p.parameter + first) for p in layout.pieces[flat])
        members[tensor] = tuple(n + first for n in layout.members[flat])
        names += [f"layers.{n}.weight" for n in members[tensor]]
        shapes += layout.shapes
        tensors.append(tensor)
    held = tuple((p.parameter, 0, p.numel) for some in pieces.values() for p in some)
    optimizer = build_optimizer(config, groups, guarded=False)
    assert isinstance(optimizer, FragmentOptimizer)
    optimizer.bind(Layout(tuple(names), tuple(shapes), pieces, members, (held,), rank=0, replicated=False))
    with fake_gpu():
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()


def test_a_guarded_update_waits_once_for_the_norm() -> None:
    """At stage 0 in fp32 nobody else looks at the gradients."""
    model = moved(tiny_encoder())
    config = OptimizerConfig()
    optimizer = build_optimizer(config, parameter_groups(model, config), guarded=True)
    with fake_gpu():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with pytest.raises(HostWaitsError, match="_local_scalar_dense"):
            optimizer.step()
