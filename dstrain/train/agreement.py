"""What all ranks learn from each other before a step, in one small sum: counters, the ledger, flags, faults.

Everything that a step needs to know about the other ranks rides on it, so that a step has one agreement however much is
agreed on. Does no step.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from dstrain.base.control import ControlPlane
from dstrain.base.errors import DstrainError, MachineError
from dstrain.base.protocols import Interrupted, StepData, StepFlags

AnyData = StepData | DstrainError | Interrupted
"""This rank's share of a step, or why it has none."""


@dataclass(frozen=True)
class Agreed:
    """Sums over all ranks."""

    num_targets: int
    num_tokens: int
    num_rows: int
    padded_tokens: int
    ledger: int
    flags: StepFlags
    """What any rank asked for."""
    damaged: tuple[tuple[str, int], ...]
    """(source, block) of blocks that some rank did without."""


def agree(control: ControlPlane, data: AnyData, flags: StepFlags, *, left_out: bool) -> Agreed:
    """Collective. Sum up a step over all ranks, or leave it together.

    Args:
        control: agreements between ranks.
        data: this rank's.
        flags: what this rank asks for.
        left_out: whether this rank left out the update of the step before; all ranks must have judged alike.

    Raises:
        DstrainError: this rank's data fault; PeerError where another rank had one.
        Interrupted: some rank did not wait for its data.
        MachineError: the ranks judged the step before differently, so their weights are no longer the same.
    """
    fault = data if isinstance(data, DstrainError) else None
    share = data if isinstance(data, StepData) else _NOTHING
    local = (
        sum(b.num_targets for b in share.micro_batches),
        sum(b.num_tokens for b in share.micro_batches),
        share.num_rows,
        share.padded_tokens,
        share.ledger & 0xFFFFFFFF,
        share.ledger >> 32,
        int(fault is not None),
        int(isinstance(data, Interrupted)),
        len(share.damaged),
        int(left_out),
        *map(int, astuple(flags)),
    )
    targets, tokens, rows, padded, low, high, faults, leaving, damages, out, *asked = control.sum(local)
    if 0 < out < control.world.size:
        raise MachineError(
            f"{out} of {control.world.size} ranks left out the last update and the others took it, so their weights differ: "
            "start again, the run goes on from the last checkpoint; if it happens again, look for a faulty GPU or host"
        )
    if faults:
        control.together(lambda: _raise(fault))
    if leaving:
        raise Interrupted("asked to stop while waiting for data")
    damaged = _all_damaged(control, share) if damages else ()
    agreed = StepFlags(*(number > 0 for number in asked))
    return Agreed(targets, tokens, rows, padded, (low + (high << 32)) % (1 << 63), agreed, damaged)


_NOTHING = StepData((), num_rows=0, padded_tokens=0, ledger=0, epoch=0.0)


def _all_damaged(control: ControlPlane, data: StepData) -> tuple[tuple[str, int], ...]:
    """Collective. Blocks that any rank could not read, the same tuple on every rank."""
    found = control.gather_json([list(entry) for entry in data.damaged])
    return tuple(sorted({(str(source), int(block)) for entries in found for source, block in entries}))


def _raise(fault: DstrainError | None) -> None:
    if fault is not None:
        raise fault
