"""Fits recover what made the measurements, and a calibrated model repeats them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.base.storage import write_json
from dstrain.planner.calibration import (
    calibrated_device,
    calibrated_stack,
    device_of,
    fit_curve,
    load_calibration,
    save_calibration,
)
from dstrain.planner.devices import Curve, find_device
from dstrain.planner.probe import AttentionRate, Measured, ProductRate, StepSample
from dstrain.planner.steptime import Stack, micro_batch_seconds
from dstrain.train.footprint import Batch
from tests.support.published_runs import model

BERT = model("BERT-base")


def measured(*, efficiency: float = 0.5, fixed_s: float = 0.01, **changes: Any) -> Measured:
    """What a probe of an H100 would find where the table and these two numbers are the truth."""
    h100 = find_device("h100")
    products = tuple(ProductRate(8192, w, w, h100.gemm.rate(w)) for w in (768, 3072, 8192))
    attention = tuple(AttentionRate(n, h100.attention.rate(n)) for n in (128, 512))
    truth = Stack("truth", efficiency=efficiency, launch_factor=0.0, fixed_s=fixed_s)
    steps = tuple(
        StepSample(rows, rows * 512, rows * 154, sum(
            micro_batch_seconds(BERT, Batch(rows * 512, rows * 154, 512), h100, precision="bf16", stack=truth)
        ))
        for rows in (16, 64)
    )  # fmt: skip
    found = Measured("cuda", "NVIDIA H100 80GB HBM3", "bf16", 1, 80 << 30, products, h100.bandwidth, attention, steps)
    return replace(found, **changes)


@given(st.floats(1e9, 1e15), st.floats(0, 2000), st.lists(st.integers(16, 16384), min_size=2, max_size=6, unique=True))
def test_a_curve_is_recovered_from_its_points(ceiling: float, half: float, sizes: list[int]) -> None:
    curve = Curve(ceiling, half)
    fitted = fit_curve([float(n) for n in sizes], [curve.rate(n) for n in sizes])
    for size in sizes:
        assert fitted.rate(size) == pytest.approx(curve.rate(size), rel=1e-6)


def test_rates_that_fall_with_size_become_their_mean() -> None:
    assert fit_curve([100.0, 200.0], [4e9, 2e9]).half == 0.0
    assert fit_curve([100.0], [4e9]) == Curve(pytest.approx(4e9), 0.0)


@given(st.floats(0.1, 1.0), st.floats(0.0, 0.1))
def test_a_calibrated_model_repeats_the_measured_micro_batches(efficiency: float, fixed_s: float) -> None:
    found = measured(efficiency=efficiency, fixed_s=fixed_s)
    device = calibrated_device(find_device("h100"), found)
    stack = calibrated_stack(BERT, device, found, context=512.0)
    assert stack.efficiency == pytest.approx(efficiency, rel=1e-3)
    for sample in found.steps:
        batch = Batch(sample.tokens, sample.scored, 512.0)
        planned = sum(micro_batch_seconds(BERT, batch, device, precision="bf16", stack=stack))
        assert planned == pytest.approx(sample.seconds, rel=1e-3)


def test_the_device_keeps_what_a_probe_cannot_see() -> None:
    base = find_device("h100")
    device = calibrated_device(base, measured())
    assert (device.link_bandwidth, device.power_w, device.name) == (base.link_bandwidth, base.power_w, "h100")
    assert device.peak_flops == 989e12
    assert device.gemm.ceiling == pytest.approx(base.gemm.ceiling)
    assert "measured" in device.title


def test_a_cpu_plans_no_gpu() -> None:
    here = measured(device="cpu", name="AMD EPYC", precision="fp32")
    with pytest.raises(ConfigError, match=r"--gpu-type h100: the calibration was measured on a CPU \(AMD EPYC\)"):
        calibrated_device(find_device("h100"), here)
    assert device_of(here) == "cpu"


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [("NVIDIA H100 80GB HBM3", 80e9, "h100"), ("NVIDIA A100-SXM4-40GB", 42e9, "a100-40"), ("NVIDIA A100-SXM4-80GB", 85e9, "a100"),
     ("NVIDIA GeForce RTX 4090", 25e9, "4090"), ("Tesla V100-SXM2-32GB", 34e9, "v100"), ("NVIDIA H200", 150e9, "h200")],
)  # fmt: skip
def test_boards_are_known_by_their_names(name: str, memory: float, known: str) -> None:
    assert device_of(measured(name=name, memory_bytes=int(memory))) == known


def test_a_file_brings_back_what_was_measured(tmp_path: Path) -> None:
    save_calibration(tmp_path / "here.json", measured())
    assert load_calibration(tmp_path / "here.json") == measured()


@pytest.mark.parametrize("content", [{}, {"format": 99}, {"format": 1, "measured": {"device": "cpu"}}, [1]])
def test_other_files_are_refused(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "other.json", content)
    with pytest.raises(ConfigError, match=r"--calibration: .*other\.json: .*--probe"):
        load_calibration(tmp_path / "other.json")


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; make one with `dstrain plan CONFIG --probe"):
        load_calibration(tmp_path / "none.json")
