"""Bytes that the ranks exchange in one optimizer step, by ZeRO stage and the settings in force. Pure arithmetic.

The collectives are those that DeepSpeed 0.19.8 issues for the JSON of `ds_config`, not those of the papers: stages 1 and 2 all-reduce
full gradients where `use_multi_rank_bucket_allreduce` is on, and stage 1 with fp32 accumulation (BF16_Optimizer) all-reduces
whatever it says. tests/dist/test_traffic.py counts them on gloo and finds the same bytes. Agreements of a few numbers a step are
left out. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.base.device import Precision
from dstrain.models.anatomy import Anatomy
from dstrain.train.ds_config import MULTI_RANK_BUCKETS, PERSISTENT_ELEMENTS, REUSE_ELEMENTS

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Collective:
    """One kind of collective in a step."""

    kind: str
    """all_reduce, reduce, all_gather or reduce_scatter."""
    num_bytes: int
    """Of the whole tensors, summed over the step's calls."""
    calls: int
    """About how many calls; sizes of buckets decide."""
    overlappable: bool = False
    """Whether it runs beside the backward or forward by itself, not at the end."""

    def wire_bytes(self, ranks: int) -> float:
        """Bytes that each rank sends in a ring: twice (N-1)/N of the whole for an all-reduce, once for the others."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * self.num_bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Sharding:
    """What decides who holds and sends what."""

    stage: int
    precision: Precision
    ranks: int
    accumulation: int = 1
    bucket_elements: int = 50_000_000
    multi_rank_buckets: bool = MULTI_RANK_BUCKETS
    """DeepSpeed's use_multi_rank_bucket_allreduce; matters at stages 1 (fp32, fp16) and 2."""
    optimizer: str = "adamw"
    """Its kind: decides the moments. What Muon and LAMB exchange besides is not counted."""

    @property
    def fp32_accumulation(self) -> bool:
        """Whether gradients are summed in a full fp32 buffer by BF16_Optimizer: stage 1 in bf16."""
        return self.stage == 1 and self.precision == "bf16"


def padded(elements: int, multiple: int) -> int:
    """The next multiple."""
    return -(-elements // multiple) * multiple


def flat_elements(anatomy: Anatomy, ranks: int) -> int:
    """Elements of the flat groups at stages 1 and 2: each padded to twice the ranks, so that partitions begin on 4 bytes."""
    return sum(padded(group, 2 * ranks) for group in anatomy.groups)


def sharded_elements(anatomy: Anatomy, ranks: int) -> int:
    """Elements at stage 3: each parameter padded to the ranks."""
    return sum(padded(elements, ranks) for elements, _ in anatomy.tensors)


def step_collectives(anatomy: Anatomy, sharding: Sharding) -> tuple[Collective, ...]:
    """The collectives of one optimizer step on each rank; none where there is one rank."""
    if sharding.ranks == 1:
        return ()
    if sharding.stage == 3:
        return _stage_3(anatomy, sharding)
    width = BYTES[sharding.precision]
    whole, flat = anatomy.parameters * width, flat_elements(anatomy, sharding.ranks) * width
    if sharding.stage == 0:
        return (Collective("all_reduce", whole, _calls(anatomy.parameters, 500_000_000)),)
    gather = Collective("all_gather", flat, len(anatomy.groups))
    if sharding.fp32_accumulation:
        return (Collective("all_reduce", flat, _calls(anatomy.parameters, 500_000_000)), gather)
    times = sharding.accumulation if sharding.stage == 2 else 1
    kind = "all_reduce" if sharding.multi_rank_buckets else "reduce"
    calls = times * _calls(anatomy.parameters, sharding.bucket_elements)
    return (Collective(kind, times * whole, calls, overlappable=sharding.stage == 2), gather)


def wire_bytes(collectives: Sequence[Collective], ranks: int) -> float:
    """Bytes that each rank sends in a step, in rings."""
    return sum(c.wire_bytes(ranks) for c in collectives)


def _stage_3(anatomy: Anatomy, sharding: Sharding) -> tuple[Collective, ...]:
    """Gradients are scattered at every micro-batch; large weights are gathered at each, small ones once after the step.

    With limits of 1e9 elements DeepSpeed keeps what a forward gathered until the backward uses it, so a model below a billion parameters
    gathers once a micro-batch, not twice as in the paper; of a larger one, what the limit does not hold is gathered again.
    """
    width, ranks, times = BYTES[sharding.precision], sharding.ranks, sharding.accumulation
    large = [padded(n, ranks) for n, _ in anatomy.tensors if n > PERSISTENT_ELEMENTS]
    small = [padded(n, ranks) for n, _ in anatomy.tensors if n <= PERSISTENT_ELEMENTS]
    again = regathered_share(anatomy)
    gathered = sum(small) + times * round(sum(large) * (1 + again))
    scattered = times * (sum(small) + sum(large))
    return (
        Collective(
            "reduce_scatter", scattered * width, times * _calls(scattered // times, sharding.bucket_elements), True
        ),
        Collective("all_gather", gathered * width, len(small) + times * len(large), True),
    )


def regathered_share(anatomy: Anatomy) -> float:
    """Share of the large weights that stage 3 gathers a second time in the backward: what the limit of live weights does not hold."""
    large = sum(n for n, _ in anatomy.tensors if n > PERSISTENT_ELEMENTS)
    return max(0.0, 1 - REUSE_ELEMENTS / large) if large else 0.0


def _calls(elements: int, bucket: int) -> int:
    return max(1, -(-elements // bucket))
