"""How long a step takes: a roofline of matrix products, attention, elementwise traffic, head, update and communication. Pure arithmetic.

Each part is its operations over the rate that the device reaches at these sizes, or its bytes over the memory's bandwidth; parts do
not overlap on one device. A stack says how well the code keeps the device busy: dstrain's own has unpadded flash attention, and on a
GPU compiled blocks; published runs use other stacks (`tests/support/published_runs.py`). Nothing here was measured on a GPU unless
the device came from a probe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dstrain.models.anatomy import Anatomy
from dstrain.planner.devices import Device
from dstrain.planner.network import Cluster, exposed_seconds
from dstrain.train.footprint import Batch
from dstrain.train.traffic import BYTES, Sharding, step_collectives


@dataclass(frozen=True)
class Stack:
    """How a training code uses a device: its efficiency class."""

    name: str
    fused: bool = False
    """Elementwise operations are fused into few kernels (compiled, or written by hand); else one kernel each, as eager torch."""
    efficiency: float = 0.92
    """Share of the roofline's speed that is reached; the rest are gaps between kernels. 0.90 to 0.95 is what good code reaches."""
    product_speed: float = 1.0
    """Matrix products against half precision: 1.35 published for FP8."""
    attention_speed: float = 1.0
    """Attention against the FlashAttention-2 of the device table."""
    launch_factor: float = 1.0
    """Launch cost against eager Python: CUDA graphs make it small."""
    overlap: float = 0.0
    """Share of the backward that hides communication."""
    dropout: bool = False
    """Whether dropout adds its passes over memory."""
    fixed_s: float = 0.0
    """Of each micro-batch, whatever its size; known for measured stacks."""


DSTRAIN = Stack("dstrain")
"""Eager, nothing overlaps, no dropout in the presets."""
DSTRAIN_COMPILED = Stack("dstrain, blocks compiled", fused=True)
"""What `engine.compile: auto` is on a GPU at stages 0 to 2."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on each rank, by part."""

    products: float
    """Matrix products of the layers."""
    attention: float
    elementwise: float
    """Activations, norms, residual sums, biases."""
    head: float
    """The vocabulary head and its loss, on scored tokens."""
    gaps: float
    """What the roofline does not explain: kernels too short for their launch, gaps between kernels."""
    update: float
    """Gradient accumulation, clipping, AdamW, casts."""
    communication: float
    """What computation does not hide."""

    @property
    def total(self) -> float:
        """Seconds."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def compute(self) -> float:
        """Seconds of forwards and backwards."""
        return self.products + self.attention + self.elementwise + self.head + self.gaps


def elementwise_elements(anatomy: Anatomy, *, fused: bool, dropout: bool = False) -> float:
    """Elements of the compute type that one token of one layer moves through memory outside of products and attention.

    Post-norm, forward: activation 2f, two sums 3d each, two norms 2d each; backward: activation 3f, norms 5d each, sums over tokens for
    biases 5d + f, gradients that meet at residuals and at q, k and v 12d. Fused: sums with norms 4d forward and 4d backward each, one
    projection for q, k and v. Gated with rotary positions, likewise: eager 80d + 18f, fused 40d + 12f.
    """
    d, f = anatomy.hidden, anatomy.intermediate
    extra = 4 * d if dropout and fused else 10 * d if dropout else 0
    if anatomy.gated:
        return (40 * d + 12 * f if fused else 80 * d + 18 * f) + extra
    return (24 * d + 6 * f if fused else 37 * d + 6 * f) + extra


def micro_batch_seconds(
    anatomy: Anatomy, batch: Batch, device: Device, *, precision: str, stack: Stack = DSTRAIN
) -> tuple[float, float, float, float, float]:
    """Forward and backward of one micro-batch: products, attention, elementwise, head, gaps; seconds."""
    width = BYTES[precision]
    speed = stack.product_speed if precision != "fp32" else device.single_flops / device.peak_flops
    products = anatomy.layers * sum(
        6 * p.weights * batch.tokens / (device.gemm.rate(min(p.inputs, p.outputs)) * speed)
        for p in anatomy.layer_products
    )
    context = anatomy.mean_context(batch.context)
    operations = 12 * anatomy.layers * anatomy.hidden * context * batch.tokens
    attention_speed = stack.attention_speed * (1.0 if precision != "fp32" else device.single_flops / device.peak_flops)
    attention = operations / (device.attention.rate(context) * attention_speed) if context else 0.0
    moved = (
        anatomy.layers * batch.tokens * width * elementwise_elements(anatomy, fused=stack.fused, dropout=stack.dropout)
    )
    if anatomy.quadratic:
        moved += anatomy.layers * batch.tokens * width * 10 * anatomy.heads * context
    elementwise = moved / device.bandwidth
    head = _head_seconds(anatomy, batch, device, width=width, speed=speed)
    busy = products + attention + elementwise + head
    launched = (75 if not stack.fused else 40) * anatomy.layers * device.launch_s * stack.launch_factor
    gaps = max(busy / stack.efficiency + stack.fixed_s, launched) - busy
    return products, attention, elementwise, head, gaps


def _head_seconds(anatomy: Anatomy, batch: Batch, device: Device, *, width: int, speed: float) -> float:
    products = sum(
        6 * p.weights * batch.scored / (device.gemm.rate(min(p.inputs, p.outputs)) * speed)
        for p in anatomy.head_products
    )
    # Logits are written, cast to fp32, searched for the largest, turned into a log-softmax, into its gradient, and cast back.
    moved = batch.scored * anatomy.vocab * (5 * 4 + 4 * width)
    return products + moved / device.bandwidth


def update_seconds(anatomy: Anatomy, sharding: Sharding, device: Device) -> float:
    """Passes over parameters, gradients and moments of one step, seconds: per micro-batch, and once.

    AdamW reads master, gradient and both moments and writes three of them: 28 bytes; clipping reads and writes the gradient, the
    cast back writes the weight. DeepSpeed's bf16 optimizer adds each micro-batch's gradients to an fp32 buffer, and flattens and
    casts it twice around the reduction.
    """
    width, parameters = BYTES[sharding.precision], anatomy.parameters
    owned = parameters / (sharding.ranks if sharding.stage else 1)
    once = owned * (28 + 8 + 4 + (4 + width if sharding.precision != "fp32" else 0))
    each = 0.0
    if sharding.fp32_accumulation:
        each = parameters * (width + 8)
        once += parameters * 4  # the buffer is set to zero
        if sharding.ranks > 1:
            once += parameters * (8 + 6 + 2 * width + 6 + 8)
    elif sharding.accumulation > 1 or sharding.stage in (2, 3):
        each = parameters * (width + 8) / (sharding.ranks if sharding.stage in (2, 3) else 1) + parameters * 2 * width
    return (once + sharding.accumulation * each) / device.bandwidth


def step_time(
    anatomy: Anatomy, batch: Batch, sharding: Sharding, cluster: Cluster, *, stack: Stack = DSTRAIN
) -> StepTime:
    """One optimizer step.

    Args:
        anatomy: the model.
        batch: of one forward of one rank.
        sharding: stage, precision, ranks, accumulation, buckets.
        cluster: devices and links.
        stack: how well the code keeps the device busy.
    """
    parts = micro_batch_seconds(anatomy, batch, cluster.device, precision=sharding.precision, stack=stack)
    products, attention, elementwise, head, gaps = (sharding.accumulation * part for part in parts)
    backward = 2 / 3 * (products + attention + elementwise + head + gaps) / sharding.accumulation
    communication = exposed_seconds(
        step_collectives(anatomy, sharding), cluster, backward_s=backward, overlap=stack.overlap
    )
    return StepTime(
        products=products, attention=attention, elementwise=elementwise, head=head, gaps=gaps,
        update=update_seconds(anatomy, sharding, cluster.device), communication=communication,
    )  # fmt: skip
