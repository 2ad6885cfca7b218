"""The fault of a rank whose peer is gone: what torch.distributed raises then, told apart from every other RuntimeError.

A collective fails on the ranks that are left when one dies, or is cut off, or does not come within the time limit. That is
no defect of theirs: they leave with "try again", and the one that died is named by its watchdog. Only errors of gloo, NCCL
and torch's store count, recognised by torch's own types or by gloo's signature, and of these only those that speak of
a lost or late peer; whatever else they complain of (sizes, a full GPU, a taken port) stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed

from dstrain.base.errors import PeerGoneError

_GLOO = re.compile(r"gloo/transport/|^Application timeout caused pair closure")
_LOST = re.compile(
    r"connection (was )?(closed|reset)|closed by (remote )?peer|broken pipe|remote process exited|ncclRemoteError"
    r"|timed? ?out|timeout|communicator was aborted|no route to host|got 0 bytes",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"^\[[^\]]*\]\s*")
_ADVICE = re.compile(r"\. (This is typically caused|Exception raised from).*", re.DOTALL)
_LONGEST = 200


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective, or the store that ranks meet at, says that another rank is gone or did not come in time."""
    text = str(error)
    if isinstance(error, distributed.DistError):
        return _LOST.search(text) is not None
    # gloo raises plain RuntimeErrors (torch 2.13).
    return type(error) is RuntimeError and _GLOO.search(text) is not None and _LOST.search(text) is not None


@contextmanager
def peer_loss_named(where: Callable[[], str]) -> Iterator[None]:
    """Turn the loss of a peer inside into a fault that says where this rank was.

    To stand around everything that enters collectives, as DeepSpeed and gradient hooks do in many places.

    Args:
        where: asked when it happens.

    Raises:
        PeerGoneError: in place of torch's error; what torch said comes with it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        raise PeerGoneError(
            f"another rank is gone or does not answer, noticed {where()}: {_told(error)}; start the same command again, "
            "the run goes on from its last checkpoint (why the rank went: its own output, exit/ and health/ of the run folder)"
        ) from None


def _told(error: BaseException) -> str:
    text = " ".join(_ADVICE.sub("", _SOURCE.sub("", str(error))).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
