"""Out of memory, said in one sentence: what was too large and which setting makes it smaller.

torch has a type for a GPU without memory and a plain RuntimeError for a host without. Frees nothing and does not try again: a
rank cannot make its step smaller alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dstrain.base.errors import ConfigError

_SIGNS = ("out of memory", "DefaultCPUAllocator", "can't allocate memory")


@contextmanager
def memory_faults_named(*, micro_batch: int, device: str, step: int) -> Iterator[None]:
    """Turn running out of memory inside into a fault that names the mend.

    Args:
        micro_batch: rows of one forward.
        device: cpu or cuda.
        step: steps done.

    Raises:
        ConfigError: in place of torch's error; what torch said comes with it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"lower train.micro_batch (now {micro_batch}; the global batch and the results stay the same)"
        if micro_batch == 1:
            smaller = "lower data.sequence_length (train.micro_batch is 1 already)"
        raise ConfigError(
            f"step {step + 1} does not fit the memory of {'the GPU' if device == 'cuda' else 'this machine'}: {smaller}, "
            f"raise engine.zero_stage, or leave the memory to this process alone ({str(error).splitlines()[0]})"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says, in either way, that there is no memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
