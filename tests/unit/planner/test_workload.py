"""Numbers of a run from its configuration, with shards and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.planner.devices import find_device
from dstrain.planner.workload import ASSUMED_VOCABULARY, Workload, workload
from dstrain.stages.config import PretrainConfig
from tests.support.runs import build_tiny_shards, pretrain_settings


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def read(shards: Path, device: str = "h100", *, sections: dict[str, Any] | None = None, **given: Any) -> Workload:
    settings = pretrain_settings(shards, Path("runs/x"), **(sections or {}))
    return workload(validate(PretrainConfig, settings, source="test"), find_device(device), **given)


def test_shards_tell_vocabulary_and_documents(shards: Path) -> None:
    found = read(shards)
    assert found.assumptions == ()
    assert found.anatomy.vocab == 400
    assert 1 < found.context < 48
    assert (found.global_batch, found.micro_batch, found.max_steps) == (12, 4, 12)
    assert found.tokens == 12 * 12 * 48


def test_without_shards_assumptions_are_said(tmp_path: Path) -> None:
    found = read(tmp_path / "not-yet")
    assert found.anatomy.vocab == ASSUMED_VOCABULARY
    assert found.context == 48
    assert len(found.assumptions) == 2
    given = read(tmp_path / "not-yet", vocabulary=1000, context=20.0)
    assert (given.anatomy.vocab, given.context, given.assumptions) == (1000, 20.0, ())


def test_damaged_shards_are_said_and_how_to_plan_without(tmp_path: Path) -> None:
    (tmp_path / "broken/train").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--vocab-size and --mean-context"):
        read(tmp_path / "broken")
    assert read(tmp_path / "broken", vocabulary=1000, context=20.0).anatomy.vocab == 1000


@pytest.mark.parametrize(("device", "precision"), [("h100", "bf16"), ("v100", "fp16"), ("cpu", "fp32")])
def test_automatic_precision_follows_the_device(shards: Path, device: str, precision: str) -> None:
    assert read(shards, device, sections={"engine": {"precision": "auto"}}).precision == precision


def test_a_schedule_of_masks_is_planned_at_its_highest_rate(shards: Path) -> None:
    rates = {"mask_rate": 0.15, "mask_rate_final": 0.4, "mask_rate_steps": 10}
    assert read(shards, sections={"objective": rates}).mask_rate == 0.4


def test_a_padded_model_is_said(shards: Path) -> None:
    found = read(shards, sections={"model": {"attention": "padded"}})
    assert found.anatomy.quadratic
    assert "padding is not counted" in found.assumptions[0]


def test_a_v100_has_no_bf16_and_the_plan_says_so(shards: Path) -> None:
    found = read(shards, "v100", sections={"engine": {"precision": "bf16"}})
    assert found.precision == "fp16"
    assert found.assumptions == ("fp16 in place of bf16, which a V100 does not have",)
