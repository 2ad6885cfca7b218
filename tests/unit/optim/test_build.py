"""Which class serves which kind; the rest is in the twins of the classes."""

import pytest

from dstrain.optim.adamw import GatedAdamW, GuardedAdamW
from dstrain.optim.build import OPTIMIZERS, build_optimizer
from dstrain.optim.config import OptimizerConfig
from dstrain.optim.fragment_optimizer import FragmentOptimizer, GuardedFragmentOptimizer
from dstrain.optim.groups import parameter_groups
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "lamb", "muon"])
def test_every_kind_is_built_and_is_among_those_deepspeed_is_told_of(kind: str, guarded: bool) -> None:
    config = OptimizerConfig(kind=kind, clip_norm=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, parameter_groups(tiny_model("bert"), config), guarded=guarded)
    wanted = (GatedAdamW, GuardedAdamW) if kind == "adamw" else (FragmentOptimizer, GuardedFragmentOptimizer)
    assert type(optimizer) is wanted[guarded]
    assert type(optimizer) in OPTIMIZERS
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
