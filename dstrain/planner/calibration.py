"""From what a probe measured to a device and an efficiency class, kept as a JSON file that later plans take.

Curves are fitted to the measured rates; what the real micro-batches took beyond the roofline becomes an efficiency and a fixed time. Two
sizes of micro-batch decide the two numbers, so a plan between and around these sizes interpolates measurements.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dstrain.base.errors import ConfigError
from dstrain.base.storage import read_json, write_json
from dstrain.models.anatomy import Anatomy
from dstrain.monitor.flops import known_peak_tflops
from dstrain.planner.devices import DEVICES, Curve, Device
from dstrain.planner.probe import Measured
from dstrain.planner.steptime import Stack, micro_batch_seconds
from dstrain.train.footprint import Batch

FORMAT = 1
_LEAST_EFFICIENCY, _MOST_EFFICIENCY = 0.02, 4.0


def fit_curve(sizes: list[float], rates: list[float]) -> Curve:
    """The curve whose reciprocal is nearest to the reciprocals of the rates, in relative terms.

    Args:
        sizes: at least one; equal sizes are averaged by the fit.
        rates: FLOP/s at them.
    """
    inverse = np.array([1 / rate for rate in rates])
    columns = np.stack([np.ones(len(sizes)), [1 / size for size in sizes]], axis=1)
    if len(set(sizes)) > 1:
        (flat, slope), *_ = np.linalg.lstsq(columns / inverse[:, None], np.ones(len(sizes)), rcond=None)
        if flat > 0 and slope >= 0:
            return Curve(float(1 / flat), float(slope / flat))
    return Curve(float(1 / inverse.mean()), 0.0)


def calibrated_device(base: Device, measured: Measured) -> Device:
    """The base device with measured rates; links and power stay the base's.

    Raises:
        ConfigError: one is a GPU and the other is not.
    """
    if base.is_gpu != (measured.device == "cuda"):
        kind = "a GPU" if measured.device == "cuda" else "a CPU"
        raise ConfigError(
            f"--gpu-type {base.name}: the calibration was measured on {kind} ({measured.name}): leave --gpu-type out, or measure on "
            "the device to plan for"
        )
    gemm = fit_curve([min(p.inputs, p.outputs) for p in measured.products], [p.flops for p in measured.products])
    attention = fit_curve([float(a.length) for a in measured.attention], [a.flops for a in measured.attention])
    known = known_peak_tflops(measured.name)
    best = max(p.flops for p in measured.products)
    peak = (
        known * 1e12
        if known is not None and measured.precision != "fp32"
        else max(base.peak_flops if base.is_gpu else 0.0, best)
    )
    # Curves hold in the precision they were measured in; a plan in fp32 is slowed down by the ratio of the peaks.
    single = peak if measured.precision == "fp32" or not base.is_gpu else base.single_flops
    return dataclasses.replace(
        base, title=f"{measured.name} (measured)", peak_flops=peak, single_flops=single, memory_bytes=measured.memory_bytes,
        bandwidth=measured.bandwidth, gemm=gemm, attention=attention,
        source=f"measured by --probe in {measured.precision} with {measured.threads} threads; links and power of {base.name}",
    )  # fmt: skip


def calibrated_stack(anatomy: Anatomy, device: Device, measured: Measured, *, context: float) -> Stack:
    """The efficiency and the fixed time of a micro-batch that make the roofline equal the measured micro-batches.

    Args:
        anatomy: of the model that was probed.
        device: calibrated already.
        measured: with two sizes of micro-batch or more.
        context: tokens that a token attended to in the probe: its row length.
    """
    plain = Stack("roofline", efficiency=1.0, launch_factor=0.0)
    busy = []
    for sample in measured.steps:
        batch = Batch(sample.tokens, sample.scored, context)
        busy.append(sum(micro_batch_seconds(anatomy, batch, device, precision=measured.precision, stack=plain)))
    seconds = [sample.seconds for sample in measured.steps]
    grown = seconds[-1] - seconds[0]
    efficiency = (busy[-1] - busy[0]) / grown if grown > 0 else busy[-1] / seconds[-1]
    efficiency = min(max(efficiency, busy[-1] / seconds[-1], _LEAST_EFFICIENCY), _MOST_EFFICIENCY)
    fixed = max(0.0, seconds[0] - busy[0] / efficiency)
    return Stack("measured", efficiency=efficiency, launch_factor=0.0, fixed_s=fixed)


def device_of(measured: Measured) -> str:
    """The device of the table that a measured one is nearest to, by its name."""
    if measured.device == "cpu":
        return "cpu"
    name = measured.name.lower()
    if "a100" in name:
        return "a100" if measured.memory_bytes > 60e9 else "a100-40"
    return next((known for known in DEVICES if known in name), "h100")


def save_calibration(path: Path, measured: Measured) -> None:
    """Write what was measured."""
    write_json(path, {"format": FORMAT, "measured": dataclasses.asdict(measured)})


def load_calibration(path: Path) -> Measured:
    """Read it.

    Raises:
        ConfigError: not a calibration of this version.
    """
    if not path.is_file():
        raise ConfigError(
            f"--calibration: {path}: no such file; make one with `dstrain plan CONFIG --probe --save-calibration {path}`"
        )
    data: Any = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"--calibration: {path}: not a calibration of format {FORMAT}; measure again with --probe")
    try:
        return TypeAdapter(Measured).validate_python(data.get("measured"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"--calibration: {path}: measured.{key}: {first['msg']}; measure again with --probe"
        ) from None
