"""Who is decayed, who is Muon's, and what reaches the optimizer."""

import pytest
from torch import nn

from dstrain.optim.adamw import GuardedAdamW
from dstrain.optim.build import build_optimizer
from dstrain.optim.config import MuonConfig, OptimizerConfig
from dstrain.optim.groups import parameter_groups
from tests.support.tiny_models import FAMILIES
from tests.support.tiny_models import tiny_model as encoder


def tiny_model():
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not():
    model = tiny_model()
    decayed, plain = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert [id(p) for p in plain["params"]] == [id(p) for p in (model[1].weight, model[1].bias, model[2].bias)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = tiny_model()
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    [plain] = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 3


def test_the_configuration_reaches_the_optimizer_with_a_rate_of_zero():
    config = OptimizerConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    for guarded in (True, False):
        optimizer = build_optimizer(config, parameter_groups(tiny_model(), config), guarded=guarded)
        assert isinstance(optimizer, GuardedAdamW) is guarded
        assert {group["lr"] for group in optimizer.param_groups} == {0.0}
        assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
        assert {group["eps"] for group in optimizer.param_groups} == {1e-3}
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_the_layers_matrices_and_neither_embeddings_nor_head(family):
    model = encoder(family)
    config = OptimizerConfig(kind="muon", weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config)
    [muon] = [g for g in groups if g["rule"] == "muon"]
    taken = {names[id(p)] for p in muon["params"]}
    assert all(p.ndim == 2 for p in muon["params"])
    assert not [n for n in taken if "embed" in n or n.startswith(("model.cls", "model.lm_head", "model.decoder"))]
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n]
    assert {id(p) for p in muon["params"]} == {id(w) for w in linear}
    others = [id(p) for g in groups if g["rule"] == "adamw" for p in g["params"]]
    assert sorted(others + [id(p) for p in muon["params"]]) == sorted(names)


def test_muons_matrices_may_have_a_rate_and_a_decay_of_their_own():
    muon = MuonConfig(learning_rate=0.02, weight_decay=0.3, scale="original")
    config = OptimizerConfig(kind="muon", learning_rate=1e-3, weight_decay=0.1, muon=muon)
    first, *others = parameter_groups(encoder("bert"), config)
    assert (first["lr_factor"], first["weight_decay"], first["momentum"]) == (20.0, 0.3, 0.95)
    assert [g["weight_decay"] for g in others] == [0.1, 0.0]
    first, *_ = parameter_groups(encoder("bert"), OptimizerConfig(kind="muon", weight_decay=0.1))
    assert (first["lr_factor"], first["weight_decay"]) == (1.0, 0.1)
