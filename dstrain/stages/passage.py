"""What training really does of a model's layers at each step, for the count of useful arithmetic; decides and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

from dstrain.models.anatomy import Anatomy
from dstrain.monitor.flops import Passage
from dstrain.stages.assembly import Assembly


def passage_of(parts: Assembly, anatomy: Anatomy) -> Callable[[int], Passage]:
    """A token's way through the layers at a step, by what the run's switches leave out and its windows leave unseen.

    Args:
        parts: of the run.
        anatomy: of its model.

    Returns:
        Of a step (optimizer steps done before it) the share of the layers, and the tokens attended to in them. A layer that
        sees a share of each document attends within that share.
    """

    def at(step: int) -> Passage:
        shares = parts.layer_shares(step) if parts.layer_shares is not None else [1.0] * anatomy.layers
        seen = sum(shares)
        if not seen:
            return Passage(0.0, 0.0)
        attended = sum(share * anatomy.mean_context(share * parts.mean_context) for share in shares)
        return Passage(seen / len(shares), attended / seen)

    return at
