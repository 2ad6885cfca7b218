"""Settings that contradict each other are refused."""

import pytest
from pydantic import ValidationError

from dstrain.optim.config import MuonConfig, OptimizerConfig


def test_muons_settings_belong_to_muon() -> None:
    with pytest.raises(ValidationError, match="muon belongs to kind: muon, not to kind: lamb"):
        OptimizerConfig(kind="lamb", muon=MuonConfig(momentum=0.9))
    assert OptimizerConfig(kind="muon", muon=MuonConfig(momentum=0.9)).muon.momentum == 0.9


def test_the_original_scale_needs_a_rate_of_its_own() -> None:
    with pytest.raises(ValidationError, match="scale: original needs learning_rate"):
        MuonConfig(scale="original")
    assert MuonConfig(scale="original", learning_rate=0.02).learning_rate == 0.02
