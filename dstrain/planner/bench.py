"""Measure a waterfall: the device's ceilings, then each variant in a process of its own, on the run's own model and data.

Takes minutes. Everything that is written goes to a scratch folder; the run folder of the configuration is not touched.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from dstrain.base.config import to_plain, validate
from dstrain.base.device import Precision, choose_device, choose_precision, device_name, gpu_capability
from dstrain.base.errors import ConfigError, DstrainError
from dstrain.base.storage import read_json, write_json
from dstrain.models.anatomy import Anatomy
from dstrain.models.attention_kernels import Circumstances, why_not
from dstrain.monitor.flops import Passage
from dstrain.planner.calibration import calibrated_device, device_of
from dstrain.planner.devices import Device, find_device
from dstrain.planner.probe import DTYPES, Clock, Measured, measure_attention, measure_bandwidth, measure_products
from dstrain.planner.steptime import Stack, micro_batch_seconds
from dstrain.planner.variants import Job, Variant, learning_variants, variants
from dstrain.planner.waterfall import Measurement, Waterfall
from dstrain.planner.workload import Workload, workload
from dstrain.stages.config import PretrainConfig
from dstrain.train.footprint import Batch

CEILING = Stack("ceiling", fused=True, efficiency=1.0, launch_factor=0.0)
_ERROR_BYTES = 2000
_PREPARING_S = 900.0  # for imports, the model, compiling and the warm-up; what takes longer hangs


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure."""

    warmup: int = 3
    steps: int = 20
    limit_s: float = 30.0
    """Of the timed steps of one variant."""
    learning: bool = False
    """Measure the switches that change what is learned, too."""
    compile_blocks: bool | None = None
    """None: where `engine.compile: auto` would."""


def bench(config: PretrainConfig, effort: Effort, *, say: Callable[[str], None]) -> Waterfall:
    """Measure.

    Args:
        config: of the run; its shards must be there.
        effort: how long.
        say: told of progress, a line at a time.

    Raises:
        ConfigError: the configuration or its data do not fit, or not even the first variant could run.
    """
    device = choose_device(config.engine.device)
    precision = choose_precision(config.engine.precision, device=device)
    say(f"measuring the ceilings of {device_name(device)}")
    base = find_device("cpu") if device == "cpu" else None
    work = workload(config, base or find_device("h100"))
    if device == "cpu" and config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)

    def look() -> Measured:
        return ceilings(work.anatomy, sequence_length=config.data.sequence_length, device=device, precision=precision)

    first = look()
    model_type = work.anatomy.family
    compiles = effort.compile_blocks if effort.compile_blocks is not None else device == "cuda"
    chosen = variants(model_type=model_type, compiles=compiles, micro_batch=config.train.micro_batch)
    done, failed = _measure_all(config, chosen, effort, say=say)
    measured = higher(first, look())  # a neighbour's work at one of the two moments is no property of the device
    limit = calibrated_device(base or find_device(device_of(measured)), measured)
    if not done:
        raise ConfigError(f"dstrain bench: no variant could run; the first said: {failed[0][1]}")
    if effort.learning:
        fastest = max(done, key=lambda pair: pair[1]["tokens"] / pair[1]["seconds"])[0]
        more, more_failed = _measure_all(config, learning_variants(fastest), effort, say=say)
        done, failed = [*done, *more], [*failed, *more_failed]
    rates = [
        _measurement(variant, answer, work.anatomy, limit, work=work, precision=precision) for variant, answer in done
    ]
    size = f"{work.anatomy.parameters / 1e6:.0f} M parameters, rows of {config.data.sequence_length}"
    title = f"{model_type}, {size}, {precision}, {measured.name}"
    return Waterfall(title, describe_ceilings(limit, measured), rates, failed)


def ceilings(anatomy: Anatomy, *, sequence_length: int, device: str, precision: Precision) -> Measured:
    """What the device can do at this model's shapes, without the model: products, bandwidth, attention."""
    on_gpu = device == "cuda"
    clock = Clock(device, limit_s=1.0)
    tokens = 16384 if on_gpu else 2048
    widths = sorted({(p.inputs, p.outputs) for p in (*anatomy.layer_products, *anatomy.head_products)})
    products = measure_products(
        [(tokens, inputs, outputs) for inputs, outputs in widths], device=device, precision=precision, clock=clock
    )
    bandwidth = measure_bandwidth(
        device=device, precision=precision, num_bytes=(1 << 30) if on_gpu else (64 << 20), clock=clock
    )
    circumstances = Circumstances(
        device=device, dtype=DTYPES[precision], head_width=anatomy.hidden // anatomy.heads, dropout=0.0,
        capability=gpu_capability(device),
    )  # fmt: skip
    attention = measure_attention(
        sorted({min(128, sequence_length), sequence_length}), tokens=max(tokens, sequence_length), heads=anatomy.heads,
        width=anatomy.hidden // anatomy.heads, device=device, precision=precision, clock=clock,
        kernel="sdpa" if why_not("varlen", circumstances) else "varlen",
    )  # fmt: skip
    if on_gpu:
        torch.cuda.empty_cache()  # for the variants, which are other processes
    memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    return Measured(
        device=device, name=device_name(device), precision=precision, threads=torch.get_num_threads(),
        memory_bytes=int(memory), products=tuple(products), bandwidth=bandwidth, attention=tuple(attention), steps=(),
    )  # fmt: skip


def higher(one: Measured, other: Measured) -> Measured:
    """The higher rate of two measurements of one device, shape by shape."""
    return dataclasses.replace(
        one, bandwidth=max(one.bandwidth, other.bandwidth),
        products=tuple(max(pair, key=lambda p: p.flops) for pair in zip(one.products, other.products, strict=True)),
        attention=tuple(max(pair, key=lambda a: a.flops) for pair in zip(one.attention, other.attention, strict=True)),
    )  # fmt: skip


def describe_ceilings(limit: Device, measured: Measured) -> str:
    """One line for people."""
    products, attention = (max(x.flops for x in found) / 1e12 for found in (measured.products, measured.attention))
    return (
        f"Measured ceilings: matrix products {products:.3g} TFLOP/s at this model's shapes (peak taken as "
        f"{limit.peak_flops / 1e12:.3g}), memory {measured.bandwidth / 1e9:.3g} GB/s, attention {attention:.3g} TFLOP/s."
    )


def _measure_all(
    config: PretrainConfig, chosen: Sequence[Variant], effort: Effort, *, say: Callable[[str], None]
) -> tuple[list[tuple[Variant, dict[str, Any]]], list[tuple[Variant, str]]]:
    done: list[tuple[Variant, dict[str, Any]]] = []
    failed: list[tuple[Variant, str]] = []
    with tempfile.TemporaryDirectory(prefix="dstrain-bench-") as scratch:
        for number, variant in enumerate(chosen):
            try:
                answer = _in_a_process(variant_config(config, variant, Path(scratch)), variant, effort, Path(scratch))
            except DstrainError as error:
                failed.append((variant, str(error)))
                say(f"{variant.name}: could not run: {error}")
                continue
            done.append((variant, answer))
            say(f"{number + 1}/{len(chosen)} {variant.name}: {answer['tokens'] / answer['seconds']:,.0f} tokens/s")
    return done, failed


def variant_config(config: PretrainConfig, variant: Variant, scratch: Path) -> dict[str, Any]:
    """The configuration with the variant's keys: one micro-batch a step, and a run folder of its own.

    Raises:
        ConfigError: the keys do not go together.
    """
    plain = to_plain(config)
    for name, section in variant.sections.items():
        plain[name] = {**(plain[name] or {}), **section}
    plain["train"]["global_batch"] = plain["train"]["micro_batch"]
    plain["train"]["evaluate_rows"] = 1
    plain["data"]["lanes"] = None
    plain["run_folder"] = str(scratch / "run")
    return to_plain(validate(PretrainConfig, plain, source=f"dstrain bench, {variant.name}"))


def _in_a_process(config: dict[str, Any], variant: Variant, effort: Effort, scratch: Path) -> dict[str, Any]:
    job, out = scratch / "job.json", scratch / "answer.json"
    out.unlink(missing_ok=True)
    write_json(job, dataclasses.asdict(
        Job(config, variant.head, warmup=effort.warmup, steps=effort.steps, limit_s=effort.limit_s, out=str(out))
    ))  # fmt: skip
    command = [sys.executable, "-m", "dstrain.planner.bench_variant", str(job)]
    limit_s = effort.limit_s + _PREPARING_S
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, errors="replace", timeout=limit_s
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(f"it was not done after {limit_s:.0f} s, and was killed") from None
    if ended.returncode or not out.is_file():
        lines = [line for line in ended.stderr[-_ERROR_BYTES:].splitlines() if line.strip()]
        raise ConfigError(lines[-1] if lines else f"it ended with code {ended.returncode} and said nothing")
    answer: dict[str, Any] = read_json(out)
    return answer


def _measurement(
    variant: Variant, answer: dict[str, Any], anatomy: Anatomy, limit: Device, *, work: Workload, precision: Precision
) -> Measurement:
    tokens, seconds = answer["tokens"], answer["seconds"]
    batch = Batch(tokens=tokens, scored=answer["scored"], context=min(answer["mean_context"], work.sequence_length))
    useful = useful_flops(anatomy, batch, Passage(**answer["passage"]))
    # What a switch leaves out of the layers is not in the ceilings: their time counts for the arithmetic that is left.
    left = useful / useful_flops(anatomy, batch)
    ceiling = left * sum(micro_batch_seconds(anatomy, batch, limit, precision=precision, stack=CEILING))
    return Measurement(
        variant=variant, tokens_per_second=tokens / seconds,
        mfu=useful / seconds / limit.peak_flops, of_roofline=ceiling / seconds,
        peak_bytes=answer["peak_bytes"], last_loss=answer["losses"][-1],
    )  # fmt: skip


def useful_flops(anatomy: Anatomy, batch: Batch, passage: Passage | None = None) -> float:
    """Forward and backward, real tokens only, the head where something is scored: FLOP.

    Args:
        anatomy: of the model.
        batch: tokens, targets, context.
        passage: of a token through the layers, with what was left out. Default: through all of them.
    """
    passage = passage or Passage(1.0, anatomy.mean_context(batch.context))
    visits = anatomy.layers * passage.layer_share * batch.tokens
    body = visits * sum(6 * p.weights for p in anatomy.layer_products)
    attention = 12 * visits * anatomy.hidden * passage.mean_context
    head = sum(6 * p.weights for p in anatomy.head_products) * batch.scored
    return float(body + attention + head)
