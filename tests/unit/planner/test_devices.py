"""The device table against what is measured and published of its devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.monitor.flops import known_peak_tflops
from dstrain.planner.devices import DEVICES, INTERCONNECTS, Curve, find_device, find_interconnect
from dstrain.planner.prices import load_prices


def test_products_of_an_h100_are_those_measured_and_published() -> None:
    gemm = find_device("h100").gemm
    assert gemm.rate(8192) == pytest.approx(798e12, rel=0.04)  # measured on an H100 80GB HBM3
    assert 590e12 < gemm.rate(768) < gemm.rate(1024) < 690e12  # what encoder widths reach


@pytest.mark.parametrize(("length", "tflops"), [(512, 185), (1024, 218)])
def test_attention_of_an_h100_is_that_of_the_charts(length: int, tflops: float) -> None:
    """FlashAttention-2 at head width 64, forward and backward, from the FlashAttention-3 charts."""
    assert find_device("h100").attention.rate(length) == pytest.approx(tflops * 1e12, rel=0.02)


def test_peaks_agree_with_those_that_a_run_reports_utilisation_with() -> None:
    boards = {
        "a100": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "h200": "NVIDIA H200",
        "b200": "NVIDIA B200",
    }
    for name, board in boards.items():
        assert known_peak_tflops(board) == DEVICES[name].peak_flops / 1e12


def test_no_rate_is_above_the_peak_and_every_number_has_a_source() -> None:
    for device in DEVICES.values():
        assert device.gemm.ceiling <= device.peak_flops
        assert device.attention.ceiling <= device.peak_flops
        assert device.source


def test_the_packaged_prices_know_every_device() -> None:
    assert set(load_prices(None).devices) == set(DEVICES)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-type: h101: not in the table \(v100.*--probe"):
        find_device("h101")
    with pytest.raises(ConfigError, match=r"--interconnect: token-ring: .*ib400"):
        find_interconnect("token-ring")
    assert find_device("H100").name == "h100"
    assert find_interconnect("IB400") is INTERCONNECTS["ib400"]


@given(st.floats(1e9, 1e15), st.floats(0, 1e4), st.floats(1, 1e5))
def test_a_curve_rises_to_its_ceiling(ceiling: float, half: float, size: float) -> None:
    curve = Curve(ceiling, half)
    assert curve.rate(size) <= curve.rate(2 * size) <= ceiling * (1 + 1e-9)
    if half >= 1:
        assert curve.rate(half) == pytest.approx(ceiling / 2)
