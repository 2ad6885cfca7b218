"""A fault of one host before its ranks have met those of others: told to all, who would else wait for ranks that have left.

What the ranks of one host read (the run's YAML, the place of the run folder) they find alike; another host may lack a file
or a mount. Its ranks go to the meeting point only to say so. Reads no configuration, so its own times count.
"""

from __future__ import annotations

import socket

from dstrain.base.errors import DstrainError, PeerError, PeerGoneError
from dstrain.base.protocols import Interrupted, ShouldLeave, never
from dstrain.base.rendezvous import open_store
from dstrain.base.roll_call import Waiting, Word, call_roll
from dstrain.base.world import World

MEET_S = 60.0
"""How long to look for rank 0; as rank 0, how long to wait until the others have read it. Their imports take seconds."""


def tell(
    fault: DstrainError, world: World, *, should_leave: ShouldLeave = never, meet_s: float = MEET_S
) -> DstrainError:
    """Collective among the ranks that come. Say that this rank cannot take part.

    Args:
        fault: why.
        world: this process's place.
        should_leave: whether to stop waiting.
        meet_s: longest wait for the others, in seconds.

    Returns:
        What this rank is to leave with: its own fault, or a PeerError where another rank's is the one that is told.
    """
    word = Word(socket.gethostname(), fault=str(fault), code=int(fault.exit_code))
    try:
        store = open_store(world, join_s=meet_s, timeout_s=int(meet_s) or 1, should_leave=should_leave)
        call_roll(store, world, word, Waiting(meet_s, should_leave, late_s=meet_s))
    except (PeerGoneError, Interrupted, RuntimeError):  # nobody there to be told
        return fault
    except PeerError as other:
        return other
    except DstrainError as own:
        return fault if world.is_first else own  # with the host's name, which is news to rank 0's only
    return fault
