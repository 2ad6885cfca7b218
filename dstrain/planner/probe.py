"""Measure this device: matrix products by shape, memory bandwidth, attention by length, and real micro-batches of the model at two sizes.

For a plan's calibration and for benchmarks that want a roofline of the machine they run on. Works on CUDA and on CPUs, in plain torch
(no engine), within a time limit. Each number is the median of repeated runs after warm-up; a machine that does other work at the same
time gives lower ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from dstrain.base.device import Precision, device_name
from dstrain.base.errors import ConfigError
from dstrain.base.protocols import MicroBatch
from dstrain.models.anatomy import Anatomy
from dstrain.models.attention import SegmentLayout, segment_attention, segment_layout
from dstrain.models.blocks import compile_blocks
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import build_masked_lm, choose_attention_kernel
from dstrain.objectives.mlm import MlmObjective
from dstrain.train.compiling import choose_compiling
from dstrain.train.device_feed import DeviceFeed
from dstrain.train.ds_config import EngineConfig
from dstrain.train.memory import is_out_of_memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LEAST_RUNS, _MOST_RUNS = 3, 50


@dataclass(frozen=True)
class ProductRate:
    """A matrix product (tokens, inputs) × (inputs, outputs) and its rate."""

    tokens: int
    inputs: int
    outputs: int
    flops: float
    """FLOP/s."""


@dataclass(frozen=True)
class AttentionRate:
    """Attention inside segments of one length, forward and backward."""

    length: int
    flops: float
    """FLOP/s."""


@dataclass(frozen=True)
class StepSample:
    """Forward and backward of one micro-batch of the model."""

    rows: int
    tokens: int
    scored: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What a probe found on one device."""

    device: str
    """cpu or cuda."""
    name: str
    """Of the board or processor."""
    precision: Precision
    threads: int
    """Of torch, on a CPU."""
    memory_bytes: int
    products: tuple[ProductRate, ...]
    bandwidth: float
    """Bytes/s of a sum of two arrays, reads and writes counted."""
    attention: tuple[AttentionRate, ...]
    steps: tuple[StepSample, ...]
    """At growing micro-batches."""


class Clock:
    """Times repeated runs until a share of the limit is spent."""

    def __init__(self, device: str, *, limit_s: float) -> None:
        """Start.

        Args:
            device: cpu or cuda.
            limit_s: of one timing.
        """
        self._on_gpu, self._limit = device == "cuda", limit_s

    def median(self, run: Callable[[], object]) -> float:
        """Seconds of one run; at least three are made, after one that does not count."""
        self._timed(run)
        end = time.perf_counter() + self._limit
        seconds: list[float] = []
        while len(seconds) < _LEAST_RUNS or (time.perf_counter() < end and len(seconds) < _MOST_RUNS):
            seconds.append(self._timed(run))
        return statistics.median(seconds)

    def _timed(self, run: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def measure_products(
    shapes: Iterable[tuple[int, int, int]], *, device: str, precision: Precision, clock: Clock
) -> list[ProductRate]:
    """Rates of matrix products (tokens, inputs, outputs), the GEMM ceiling by shape."""
    found = []
    for tokens, inputs, outputs in shapes:
        left = torch.randn(tokens, inputs, device=device, dtype=DTYPES[precision])
        right = torch.randn(outputs, inputs, device=device, dtype=DTYPES[precision])
        seconds = clock.median(lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
        found.append(ProductRate(tokens, inputs, outputs, 2 * tokens * inputs * outputs / seconds))
    return found


def measure_bandwidth(*, device: str, precision: Precision, num_bytes: int, clock: Clock) -> float:
    """Bytes/s of c = a + b over arrays of `num_bytes` each, two reads and a write counted."""
    dtype = DTYPES[precision]
    first = torch.ones(num_bytes // dtype.itemsize, device=device, dtype=dtype)
    second, result = torch.ones_like(first), torch.empty_like(first)
    seconds = clock.median(lambda: torch.add(first, second, out=result))
    return 3 * first.numel() * dtype.itemsize / seconds


def measure_attention(
    lengths: Iterable[int], *, tokens: int, heads: int, width: int, device: str, precision: Precision, clock: Clock,
    kernel: str = "sdpa",
) -> list[AttentionRate]:  # fmt: skip
    """Rates of the model's own attention function on equal segments that fill `tokens`, forward and backward."""
    found = []
    for length in lengths:
        segments = max(1, tokens // length)
        total, dtype = segments * length, DTYPES[precision]
        layout = segment_layout((length,) * segments, device=torch.device(device), kernel=kernel)
        query, key, value = (
            torch.randn(1, total, heads, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )

        def run(
            query: Tensor = query, key: Tensor = key, value: Tensor = value, layout: SegmentLayout = layout
        ) -> None:
            out = segment_attention(query, key, value, layout, scale=width**-0.5, dropout=0.0, window=None)
            out.sum().backward()
            query.grad = key.grad = value.grad = None

        found.append(AttentionRate(length, 12 * total * length * heads * width / clock.median(run)))
    return found


def build_model(
    config: ModelConfig, engine: EngineConfig, anatomy: Anatomy, *, device: str, precision: Precision
) -> nn.Module:
    """The run's model with random weights on the device, with the kernel and the compiled blocks that a run would have."""
    torch.manual_seed(0)
    model = build_masked_lm(config, vocab_size=anatomy.vocab, special={"pad_token_id": 0})
    choose_attention_kernel(model, config.attention_kernel, device=device, precision=precision)
    if choose_compiling(engine, device=device, unpadded=model.attention == "unpadded").enabled:
        compile_blocks(model.model)
    return model.to(device=device, dtype=DTYPES[precision]).train()


def measure_steps(
    model: nn.Module,
    rows: Iterable[int],
    *,
    vocab: int,
    sequence_length: int,
    mask_rate: float,
    device: str,
    clock: Clock,
) -> list[StepSample]:
    """Forwards and backwards of a model on random tokens; a size that does not fit ends the list."""
    objective, feed, found = MlmObjective(), DeviceFeed(device), []
    for number in rows:
        batch = next(iter(feed([_random_rows(number, sequence_length, mask_rate, vocab)])))

        def run(batch: MicroBatch = batch) -> None:
            objective.loss(model, batch).loss_sum.backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)

        try:
            seconds = clock.median(run)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        found.append(StepSample(number, number * sequence_length, len(batch.targets), seconds))
    return found


def probe(
    config: ModelConfig, engine: EngineConfig, anatomy: Anatomy, *, sequence_length: int, mask_rate: float, device: str,
    precision: Precision, limit_s: float = 30.0,
) -> Measured:  # fmt: skip
    """Measure everything a plan can use.

    Args:
        config: the run's model section.
        engine: its engine section; decides whether blocks are compiled.
        anatomy: of that model.
        sequence_length: tokens of a row.
        mask_rate: share of tokens scored.
        device: cpu or cuda.
        precision: resolved.
        limit_s: about how long all timings may take; at least three runs of each are made, and compiling comes on top.

    Raises:
        ConfigError: not even two sizes of a micro-batch fit this device.
    """
    clock = Clock(device, limit_s=limit_s / 14)
    on_gpu = device == "cuda"
    tokens, square = (16384, 8192) if on_gpu else (1024, 1024)
    widths = sorted({(p.inputs, p.outputs) for p in anatomy.layer_products})
    shapes = [(tokens, inputs, outputs) for inputs, outputs in widths] + [(square, square, square)]
    model = build_model(config, engine, anatomy, device=device, precision=precision)
    kernel = str(getattr(model, "kernel", "sdpa"))
    steps = measure_steps(
        model, _step_rows(sequence_length, on_gpu=on_gpu), vocab=anatomy.vocab, sequence_length=sequence_length,
        mask_rate=mask_rate, device=device, clock=clock,
    )  # fmt: skip
    del model
    if len(steps) < 2:
        raise ConfigError(
            f"--probe: not two micro-batches of the model fit {device_name(device)}: shorten data.sequence_length or plan without"
        )
    memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    size = (1 << 30) if on_gpu else (64 << 20)
    return Measured(
        device=device, name=device_name(device), precision=precision, threads=torch.get_num_threads(), memory_bytes=int(memory),
        products=tuple(measure_products(shapes, device=device, precision=precision, clock=clock)),
        bandwidth=measure_bandwidth(device=device, precision=precision, num_bytes=size, clock=clock),
        attention=tuple(measure_attention(
            sorted({min(128, sequence_length), sequence_length}), tokens=max(tokens, sequence_length), heads=anatomy.heads,
            width=anatomy.hidden // anatomy.heads, device=device, precision=precision, clock=clock, kernel=kernel,
        )),
        steps=tuple(steps),
    )  # fmt: skip


def _step_rows(sequence_length: int, *, on_gpu: bool) -> tuple[int, int]:
    """Two micro-batches: a quarter and all of 32 Ki tokens on a GPU, of 2 Ki on a CPU; at least one row and two."""
    tokens = 32768 if on_gpu else 2048
    small = max(1, tokens // 4 // sequence_length)
    return small, max(2 * small, tokens // sequence_length)


def _random_rows(rows: int, length: int, mask_rate: float, vocab: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, vocab, (rows * length,), generator=generator)
    scored = max(1, round(rows * length * mask_rate))
    targets = torch.randperm(rows * length, generator=generator)[:scored].sort().values
    return MicroBatch(
        tokens=tokens, positions=torch.arange(length).repeat(rows), lengths=(length,) * rows, targets=targets,
        labels=tokens[targets], num_targets=scored, num_tokens=rows * length,
    )  # fmt: skip
