"""Whether a run's blocks are compiled, and micro-batches filled up to few shapes so that they are compiled once.

Filled-up tokens form segments of their own, which no token of a document sees, and are never targets; the counts that losses are
divided by and the ledger do not know them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dstrain.base.errors import ConfigError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import IGNORED_LABEL, MicroBatch, RunState, StepReport
from dstrain.models.blocks import num_graphs
from dstrain.train.ds_config import EngineConfig

_LOG = get_logger(__name__)
_FIRST_STEPS = 4  # within which every usual shape of targets has been seen
_STEPS = 8
"""Sizes between a power of two and the next: at most 1/8 is filled up, half of that on average."""


@dataclass(frozen=True)
class Compiling:
    """What was decided."""

    enabled: bool
    reason: str
    """In words, for people."""


def choose_compiling(config: EngineConfig, *, device: str, unpadded: bool) -> Compiling:
    """Decide whether blocks are compiled.

    Args:
        config: the engine section.
        device: cpu or cuda.
        unpadded: whether the model takes flat micro-batches; padded rows have a shape for every longest document.

    Raises:
        ConfigError: asked for and not possible.
    """
    obstacle = None
    if config.zero_stage == 3:
        obstacle = "ZeRO stage 3 gathers weights in hooks, which cut every block into pieces: use stage 1"
    elif not unpadded:
        obstacle = "the model takes padded rows, whose shapes differ from batch to batch"
    if config.compile == "blocks" and obstacle is not None:
        raise ConfigError(f"engine.compile: blocks is not possible here: {obstacle}; or set engine.compile: auto")
    if config.compile == "off":
        return Compiling(False, "switched off")
    if obstacle is not None:
        return Compiling(False, obstacle)
    if config.compile == "auto" and device == "cpu":
        return Compiling(False, "on a CPU matrices take nearly all the time, and compiling takes a minute")
    return Compiling(True, "every block, in shapes that stay the same")


class GraphWatch:
    """An observer that tells how many graphs were compiled, and warns when later steps still compile."""

    def __init__(self, event: Callable[..., None], *, count: Callable[[], int] = num_graphs) -> None:
        """Begin with what is compiled so far.

        Args:
            event: takes a name and fields.
            count: graphs compiled by this process.
        """
        self._event, self._count = event, count
        self._steps, self._known = 0, count()

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Compare with the step before; the first steps see every usual shape."""
        graphs = self._count()
        self._steps += 1
        if graphs == self._known:
            return
        self._known = graphs
        self._event("compiled", step=report.step, graphs=graphs)
        if self._steps > _FIRST_STEPS:
            _LOG.warning(
                "step %d: compiled again, %d graphs by now: micro-batches have more shapes than expected; "
                "engine.compile: off goes on without",
                report.step, graphs,
            )  # fmt: skip

    def on_end(self, state: RunState) -> None:
        """Nothing to close."""


def few_shapes(batch: MicroBatch, *, usual_tokens: int) -> MicroBatch:
    """Fill a micro-batch up to one of few shapes.

    Args:
        batch: on the CPU.
        usual_tokens: what a full micro-batch holds at most; a batch that is nearly full becomes exactly this long.
    """
    num_tokens, num_targets = len(batch.tokens), len(batch.targets)
    nearly_full = 0.9 * usual_tokens < num_tokens <= usual_tokens
    tokens = usual_tokens if nearly_full else rounded_size(num_tokens)
    targets = rounded_size(num_targets)
    extra = tokens - num_tokens
    longest = max(batch.lengths)
    fill = [longest] * (extra // longest) + ([extra % longest] if extra % longest else [])
    positions = torch.cat([batch.positions, *(torch.arange(n) for n in fill)]) if fill else batch.positions
    return dataclasses.replace(
        batch,
        tokens=_filled(batch.tokens, tokens, 0),
        positions=positions,
        lengths=(*batch.lengths, *fill),
        targets=_filled(batch.targets, targets, 0),
        labels=_filled(batch.labels, targets, IGNORED_LABEL),
        token_types=None if batch.token_types is None else _filled(batch.token_types, tokens, 0),
    )


def rounded_size(number: int) -> int:
    """The next of 8 even steps between powers of two; at least 64.

    >>> [rounded_size(n) for n in (1, 64, 65, 1000, 4096, 4097)]
    [64, 64, 72, 1024, 4096, 4608]
    """
    if number <= 64:
        return 64
    step = max(1, 1 << ((number - 1).bit_length() - 1)) // _STEPS
    return -(-number // step) * step


def _filled(values: Tensor, size: int, value: int) -> Tensor:
    return functional.pad(values, (0, size - len(values)), value=value)
