"""Memory of one rank, part by part, from the model's anatomy and the engine's settings. Pure arithmetic.

What is counted is what DeepSpeed 0.19.8 allocates for the JSON of `ds_config`, buffers and temporary copies included, not the
papers' 16 bytes a parameter: tests/dist/test_footprint.py compares it with what processes really take, at every stage. A step has two
high points: the middle of a backward (activations, gradients so far) and the moment gradients are reduced (activations gone, copies
of the gradients there); the larger one decides. What the libraries take for themselves is a separate part, measured on a CPU, assumed on
GPUs. Host memory of the loader and of checkpoints is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dstrain.models.anatomy import Anatomy
from dstrain.objectives.linear_cross_entropy import CHUNK_BYTES, rows_at_once
from dstrain.train.traffic import BYTES, Sharding, flat_elements, regathered_share, sharded_elements

Moment = Literal["always", "backward", "reduction"]
"""When a part is there: all the time, while a backward runs, while gradients are reduced and the update is done."""

RESERVE = 0.06
"""Share of a device's memory that a plan leaves to the allocator's gaps."""
_STAGE_0_BUCKET = 500_000_000
"""Elements of DeepSpeed's all-reduce bucket where dstrain cannot set it (engine.py, bf16_optimizer.py)."""


@dataclass(frozen=True)
class Batch:
    """What one forward of one rank sees."""

    tokens: int
    """Real tokens; padded ones too where a model runs padded."""
    scored: int
    """Targets of the head."""
    context: float
    """Tokens that a token attends to, on average."""


@dataclass(frozen=True)
class Part:
    """A named piece of memory."""

    name: str
    num_bytes: int
    moment: Moment


@dataclass(frozen=True)
class Footprint:
    """All parts of one rank."""

    parts: tuple[Part, ...]

    def at(self, moment: Moment) -> int:
        """Bytes at a high point of the step; what is there always, for `always`."""
        return sum(part.num_bytes for part in self.parts if part.moment in (moment, "always"))

    @property
    def total(self) -> int:
        """Bytes at the higher of the two high points."""
        return max(self.at("backward"), self.at("reduction"))

    @property
    def peak(self) -> Moment:
        """Which high point decides."""
        return "backward" if self.at("backward") >= self.at("reduction") else "reduction"

    def at_peak(self) -> tuple[Part, ...]:
        """The parts that add up to the total, largest first."""
        present = [part for part in self.parts if part.moment in (self.peak, "always") and part.num_bytes]
        return tuple(sorted(present, key=lambda part: -part.num_bytes))


def framework_bytes(device: str, *, ranks: int) -> int:
    """What libraries take for themselves: measured on CPUs (threads, gloo), assumed on GPUs.

    A CUDA context with cuBLAS workspaces is taken as 0.75 GiB, NCCL's buffers as another 0.5 GiB; the allocator's fragmentation is
    the plan's reserve, not this.
    """
    if device == "cpu":
        return 13 << 20
    return round((0.75 + (0.5 if ranks > 1 else 0.0)) * 2**30)


def footprint(anatomy: Anatomy, sharding: Sharding, batch: Batch, *, device: str) -> Footprint:
    """Memory of one rank.

    Args:
        anatomy: the model.
        sharding: stage, precision, ranks, accumulation, buckets.
        batch: of one forward.
        device: cpu or cuda.
    """
    state = list(_states(anatomy, sharding))
    moving = [
        Part("activations", activation_bytes(anatomy, sharding, batch), "backward"),
        *_head(anatomy, sharding, batch, device),
    ]
    framework = Part("framework", framework_bytes(device, ranks=sharding.ranks), "always")
    return Footprint((*state, *moving, framework))


def activation_bytes(anatomy: Anatomy, sharding: Sharding, batch: Batch) -> int:
    """What autograd keeps of the encoder between forward and backward."""
    width = BYTES[sharding.precision]
    kept = anatomy.kept_elements
    if sharding.stage == 3:
        kept += 2 * anatomy.hidden  # DeepSpeed's hooks hold on to the outputs of modules
    if anatomy.dropout > 0:
        kept += 2 * anatomy.hidden if sharding.precision == "fp32" else anatomy.hidden
    statistics = 4 * anatomy.heads + 16  # log-sum-exp of attention, mean and deviation of two norms, fp32
    layer = batch.tokens * (kept * width + statistics)
    if anatomy.quadratic:
        layer += round(4 * anatomy.heads * batch.tokens * batch.context * width)
    embeddings = 2 * batch.tokens * anatomy.hidden * width + 4 * 8 * batch.tokens
    return round(anatomy.layers * layer + embeddings)


def _head(anatomy: Anatomy, sharding: Sharding, batch: Batch, device: str) -> Iterator[Part]:
    """The masked-LM head on scored tokens, or what the backward of a layer needs besides, whichever is more.

    Scored inside the head, a chunk of logits is there at a time, and the gradient of the vocabulary's matrix from the forward on. Else
    all logits are: in the compute type, in fp32, their log-softmax and its gradient. Either is gone when the backward reaches the
    last layer, whose feed-forward part then needs two gradients of its inner and of its outer width.
    """
    width = BYTES[sharding.precision]
    hidden = batch.scored * (5 * anatomy.hidden * width + 8)
    if anatomy.scores_at_head and sharding.precision != "fp16":
        head = hidden + _fused_head(anatomy, batch, width=width, device=device)
    else:
        head = hidden + batch.scored * anatomy.vocab * (8 + width if width < 4 else 12)
    inner = (4 if anatomy.gated else 2) * anatomy.intermediate + 2 * anatomy.hidden
    yield Part("head and logits", max(head, batch.tokens * inner * width), "backward")


def _fused_head(anatomy: Anatomy, batch: Batch, *, width: int, device: str) -> int:
    """A chunk of logits (a CPU in fp32 works in place in one buffer), and gradients of matrix and hidden states.

    See `objectives.linear_cross_entropy`.
    """
    limit = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"])
    rows = rows_at_once(batch.scored, anatomy.vocab, limit_bytes=limit) if batch.scored else 0
    logit = 4 if device == "cpu" and width == 4 else 8 + width
    in_chunks = rows < batch.scored
    matrix = width if width == 4 or not in_chunks else 4 + width  # summed over chunks in fp32
    return (
        rows * anatomy.vocab * logit + anatomy.hidden * anatomy.vocab * matrix + batch.scored * anatomy.hidden * width
    )


def _states(anatomy: Anatomy, sharding: Sharding) -> Iterator[Part]:
    if sharding.stage == 3:
        yield from _stage_3(anatomy, sharding)
    elif sharding.stage == 0:
        yield from _stage_0(anatomy, sharding)
    else:
        yield from _stages_1_and_2(anatomy, sharding)


def _stored(anatomy: Anatomy, sharding: Sharding, elements: float, *, masters: bool) -> Iterator[Part]:
    """The optimizer's moments, and fp32 masters: at stages 1 to 3 a rank's share is a copy even where weights are fp32 themselves.

    Two moments of each element; Muon has one of its matrices.
    """
    if masters:
        yield Part("fp32 masters", round(4 * elements), "always")
    single = anatomy.layer_matrices / anatomy.parameters if sharding.optimizer == "muon" else 0.0
    yield Part("moments", round(elements * (8 - 4 * single)), "always")


def _stage_0(anatomy: Anatomy, sharding: Sharding) -> Iterator[Part]:
    width, parameters = BYTES[sharding.precision], anatomy.parameters
    yield Part("weights", width * parameters, "always")
    yield from _stored(anatomy, sharding, parameters, masters=sharding.precision != "fp32")
    if sharding.accumulation > 1:
        yield Part("gradients so far", width * parameters, "backward")
    yield Part("gradients", width * parameters, "reduction")
    flattened = width * min(parameters, _STAGE_0_BUCKET) if sharding.ranks > 1 else 0
    in_fp32 = 4 * parameters if sharding.precision != "fp32" else 0  # made after the reduction's copy is gone
    yield Part("copies of gradients", max(flattened, in_fp32), "reduction")


def _stages_1_and_2(anatomy: Anatomy, sharding: Sharding) -> Iterator[Part]:
    width, ranks = BYTES[sharding.precision], sharding.ranks
    flat = flat_elements(anatomy, ranks)
    owned = flat / ranks
    yield Part("weights", width * flat, "always")
    yield from _stored(anatomy, sharding, owned, masters=True)
    if sharding.fp32_accumulation:
        yield Part("fp32 gradient buffer", 4 * flat, "always")
        if sharding.accumulation > 1:
            yield Part("gradients so far", width * anatomy.parameters, "backward")
        yield Part("gradients", width * anatomy.parameters, "reduction")
        if ranks > 1:  # the buffer is flattened into a copy, and that is cast to what travels
            copied = min(flat, _STAGE_0_BUCKET)
            yield Part("copies of gradients", (4 + width) * copied, "reduction")
        return
    bucket = min(anatomy.parameters, sharding.bucket_elements)
    if sharding.stage == 1:
        if sharding.accumulation > 1:
            yield Part("gradients so far", 4 * anatomy.parameters, "backward")
        yield Part("gradients", width * anatomy.parameters, "reduction")
        yield Part("reduce bucket", width * bucket, "reduction")
        return
    if sharding.accumulation > 1:
        yield Part("gradients so far", round(4 * owned), "backward")
    yield Part("gradients", width * bucket + round(4 * owned), "reduction")
    yield Part("reduce bucket", width * bucket, "reduction")


def _stage_3(anatomy: Anatomy, sharding: Sharding) -> Iterator[Part]:
    width, ranks = BYTES[sharding.precision], sharding.ranks
    owned = sharded_elements(anatomy, ranks) / ranks
    bucket = min(anatomy.parameters, sharding.bucket_elements)
    gathered = round(anatomy.parameters * (1 - regathered_share(anatomy)))
    yield Part("weights", round(width * owned), "always")
    yield from _stored(anatomy, sharding, owned, masters=True)
    yield Part("gradient partition", round(4 * owned), "always")
    yield Part("reduce bucket", width * bucket, "always")
    yield Part("gathered weights", width * gathered, "always")
    yield Part("copies of gradients", width * bucket + round(width * bucket / ranks), "reduction")


def fits(anatomy: Anatomy, sharding: Sharding, batch: Batch, *, device: str, capacity_bytes: float) -> bool:
    """Whether a rank's parts fit into its memory, a reserve for the allocator's gaps left out."""
    return footprint(anatomy, sharding, batch, device=device).total <= capacity_bytes * (1 - RESERVE)


def largest_micro_batch(
    anatomy: Anatomy, sharding: Sharding, row: Batch, *, device: str, capacity_bytes: float, rows: int
) -> int:
    """The most rows of a forward that fit: from 0, where not even one does, to all of a rank's rows.

    Args:
        anatomy: the model.
        sharding: stage, precision, ranks, buckets; accumulation follows from the rows.
        row: what one row is.
        device: cpu or cuda.
        capacity_bytes: memory of the device.
        rows: that a rank has in a step.
    """

    def fit(number: int) -> bool:
        split = replace(sharding, accumulation=-(-rows // number))
        return fits(anatomy, split, scaled(row, number), device=device, capacity_bytes=capacity_bytes)

    if fit(rows):  # asked first: one micro-batch needs no gradients of others beside it
        return rows
    low, high = 0, rows  # `low` rows fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def scaled(row: Batch, rows: float) -> Batch:
    """A batch of so many equal rows."""
    return replace(row, tokens=round(row.tokens * rows), scored=round(row.scored * rows))
