"""Out of memory, said in one sentence: what was too large, which setting makes it smaller, and how far it has to go.

torch has a type for a GPU without memory and a plain RuntimeError for a host without. Frees nothing and does not try again: a
rank cannot make its step smaller alone. The numbers are those of `dstrain plan`, for the micro-batch that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import MicroBatch
from dstrain.models.anatomy import Anatomy
from dstrain.train.footprint import Batch, Footprint, footprint, largest_micro_batch, scaled
from dstrain.train.traffic import Sharding

_SIGNS = ("out of memory", "DefaultCPUAllocator", "can't allocate memory")
_PARTS_TOLD = 4


@contextmanager
def memory_faults_named(
    *, what: str, micro_batch: int | None, device: str, advice: Callable[[], str] | None = None
) -> Iterator[None]:
    """Turn running out of memory inside into a fault that names the mend.

    Args:
        what: does not fit: a step, an evaluation, the engine.
        micro_batch: rows of one forward; None where no forward is involved.
        device: cpu or cuda.
        advice: what the plan says about it; asked only when it is needed.

    Raises:
        ConfigError: in place of torch's error; what torch said comes with it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        planned = f". {advice()}" if advice is not None else ""
        raise ConfigError(
            f"{what} does not fit the memory of {'the GPU' if device == 'cuda' else 'this machine'}: {_smaller(micro_batch)}raise "
            f"engine.zero_stage, or leave the memory to this process alone ({str(error).splitlines()[0]}){planned}"
        ) from error


def _smaller(micro_batch: int | None) -> str:
    if micro_batch is None:
        return ""
    if micro_batch == 1:
        return "lower data.sequence_length (train.micro_batch is 1 already), "
    return f"lower train.micro_batch (now {micro_batch}; the global batch and the results stay the same), "


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says, in either way, that there is no memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def advice_for(
    anatomy: Anatomy,
    sharding: Sharding,
    batches: Sequence[MicroBatch],
    *,
    micro_batch: int,
    device: str,
    ranks_here: int,
) -> str:
    """What the plan says about the largest of some micro-batches.

    Args:
        anatomy: the model.
        sharding: of the run.
        batches: of the step that failed; empty where not even weights and optimizer found room.
        micro_batch: most rows of a forward, as configured.
        device: cpu or cuda.
        ranks_here: processes that share this host's memory, on a CPU.
    """
    capacity = capacity_bytes(device, ranks_here=ranks_here)
    batch = max((_batch(b) for b in batches), key=lambda b: b.tokens, default=Batch(0, 0, 0.0))
    plan = footprint(anatomy, sharding, batch, device=device)
    needs = f"By the plan a rank needs {_gibibytes(plan.total)} of {_gibibytes(capacity)} ({_largest(plan)})"
    if not batch.tokens:
        return f"{needs} before the first micro-batch"
    most = largest_micro_batch(
        anatomy, sharding, scaled(batch, 1 / micro_batch), device=device, capacity_bytes=capacity,
        rows=micro_batch * sharding.accumulation,
    )  # fmt: skip
    return f"{needs}; {_fitting(most, micro_batch)}"


def capacity_bytes(device: str, *, ranks_here: int) -> int:
    """Memory of this rank's GPU, or its share of the host's."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return int(psutil.virtual_memory().total // ranks_here)


def _batch(batch: MicroBatch) -> Batch:
    tokens = sum(batch.lengths)
    return Batch(tokens, int(batch.targets.numel()), sum(n * n for n in batch.lengths) / max(1, tokens))


def _fitting(most: int, micro_batch: int) -> str:
    if most == 0:
        return "not even one row of a micro-batch fits: raise engine.zero_stage, or use more or larger devices"
    if most >= micro_batch:
        return "that should fit: something else holds memory of the device, or its allocator is fragmented"
    return f"the largest train.micro_batch that fits is {most}"


def _largest(plan: Footprint) -> str:
    return ", ".join(f"{part.name} {_gibibytes(part.num_bytes)}" for part in plan.at_peak()[:_PARTS_TOLD])


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
