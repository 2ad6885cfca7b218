"""The mean of the newest checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.stages.averaging import average_of
from tests.support.tiny_checkpoints import SHAPES, fragments_of, manifest_of, save, state_of, writer_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (4, 6, 8):
        save(tmp_path / "checkpoints", step)
    return tmp_path


def test_the_weights_are_the_mean_of_the_newest_and_moments_play_no_part(run: Path) -> None:
    found = average_of(run, "last:2")
    assert found.steps == (6, 8)
    assert found.newest.manifest.step == 8
    assert {name: list(t.shape) for name, t in found.weights.items()} == SHAPES
    expected = (state_of(6)["encoder.weight", "fp32"] + state_of(8)["encoder.weight", "fp32"]) / 2
    torch.testing.assert_close(found.weights["encoder.weight"].reshape(-1), expected)
    three = sum(state_of(step)["scale", "fp32"] for step in (4, 6, 8)) / 3
    torch.testing.assert_close(average_of(run, "last:3").weights["scale"].reshape(-1), torch.as_tensor(three))


def test_one_checkpoint_is_its_own_mean_bit_for_bit(run: Path) -> None:
    found = average_of(run, "last:1", step=6)
    assert found.steps == (6,)
    assert torch.equal(found.weights["encoder.weight"].reshape(-1), state_of(6)["encoder.weight", "fp32"])


def test_it_may_end_at_an_earlier_step(run: Path) -> None:
    assert average_of(run, "last:2", step=6).steps == (4, 6)


@pytest.mark.parametrize("form", ["5", "last:0", "last:", "ema:0.99", "last:2 "])
def test_other_forms_are_refused(run: Path, form: str) -> None:
    with pytest.raises(ConfigError, match="write last:K"):
        average_of(run, form)


def test_fewer_checkpoints_than_asked_for_are_told(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds checkpoints of steps \[4, 6, 8\] only: .*keep_last"):
        average_of(run, "last:4")
    with pytest.raises(ConfigError, match=r"steps \[4, 6\] only"):
        average_of(run, "last:2", step=7)


def test_damage_and_other_models_are_refused(run: Path) -> None:
    writer_of(run / "checkpoints").save(
        fragments_of(state_of(10)), manifest_of(10, model_fingerprint="0" * 64), config_yaml="", tokenizer=None
    )
    with pytest.raises(CheckpointError, match=r"step-00000008: is of another model than .*step-00000010"):
        average_of(run, "last:2")
    (run / "checkpoints/step-00000006/config.yaml").write_text("other")
    with pytest.raises(CheckpointError, match="step-00000006"):
        average_of(run, "last:2", step=8)
