"""`dstrain bench` on tiny shards: the variants' configurations, and a whole waterfall with real processes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.monitor.flops import ModelShape, flops_per_token
from dstrain.planner import bench
from dstrain.planner.bench import Effort, higher, useful_flops, variant_config
from dstrain.planner.devices import find_device
from dstrain.planner.probe import AttentionRate, Measured, ProductRate
from dstrain.planner.variants import Variant, variants
from dstrain.planner.workload import workload
from dstrain.stages.config import PretrainConfig
from dstrain.train.footprint import Batch
from tests.support.runs import build_tiny_shards, pretrain_settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    return pretrain_settings(build_tiny_shards(folder), folder / "run", data={"lanes": 6})


def test_a_variant_has_one_micro_batch_a_step_and_a_run_folder_of_its_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = validate(PretrainConfig, settings, source="test")
    for variant in variants(model_type="bert", compiles=False, micro_batch=4):
        found = variant_config(config, variant, tmp_path)
        assert found["train"]["global_batch"] == found["train"]["micro_batch"]
        assert found["run_folder"] == str(tmp_path / "run")
        assert found["seed"] == 7
    assert found["train"]["micro_batch"] == 8


def test_a_variant_that_hangs_is_killed_and_told_and_the_others_go_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(bench.subprocess, "run", hang)
    config = validate(PretrainConfig, settings, source="test")
    chosen = variants(model_type="bert", compiles=False, micro_batch=4)[:2]
    done, failed = bench._measure_all(config, chosen, Effort(limit_s=5.0), say=lambda line: None)
    assert done == []
    assert [reason for _, reason in failed] == ["it was not done after 905 s, and was killed"] * 2


def test_keys_that_do_not_go_together_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    config = validate(PretrainConfig, settings, source="test")
    odd = Variant("odd", "", {"model": {"kind": "dstrain-encoder"}})
    with pytest.raises(ConfigError, match="dstrain bench, odd"):
        variant_config(config, odd, tmp_path)


def test_useful_arithmetic_is_that_of_the_monitor(settings: dict[str, Any]) -> None:
    config = validate(PretrainConfig, settings, source="test")
    anatomy = workload(config, find_device("cpu")).anatomy
    shape = ModelShape(anatomy.layers, anatomy.hidden, anatomy.intermediate, anatomy.vocab)
    expected = 1000 * flops_per_token(shape, mean_context=30.0, scored_share=0.15)
    assert useful_flops(anatomy, Batch(tokens=1000, scored=150, context=30.0)) == pytest.approx(expected, rel=1e-6)


def test_the_higher_of_two_looks_at_a_device_counts() -> None:
    def look(first: float, second: float, bandwidth: float) -> Measured:
        return Measured(
            device="cpu", name="x", precision="fp32", threads=1, memory_bytes=1, bandwidth=bandwidth, steps=(),
            products=(ProductRate(1, 2, 3, first), ProductRate(1, 3, 2, second)), attention=(AttentionRate(8, first),),
        )  # fmt: skip

    found = higher(look(5.0, 1.0, 9.0), look(2.0, 4.0, 3.0))
    assert [p.flops for p in found.products] == [5.0, 4.0]
    assert (found.bandwidth, found.attention[0].flops) == (9.0, 5.0)
