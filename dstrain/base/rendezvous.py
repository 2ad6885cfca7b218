"""Where the ranks meet: torch's key-value store, reached by short tries that a stop request ends.

torch's own rendezvous lets its store listen on every interface, and whoever reaches the store can write what ranks read.
Given a socket that listens already, the store keeps to it, so the ranks of one host meet on 127.0.0.1. Of several hosts
the first rank's serves, under torchrun the agent's. A rank knocks until somebody listens before it asks torch to connect,
because inside of torch it would hear no stop request and could not say what is missing. Who has come is `roll_call`'s.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from dstrain.base.errors import PeerGoneError
from dstrain.base.protocols import Interrupted, ShouldLeave, never
from dstrain.base.world import World

_BACKLOG = 512
_KNOCK_S = 1.0
_PAUSE_S = 0.1
_LAST_WORD_S = 20.0
"""How long a rank that was asked to stop still looks for rank 0, to tell it: rank 0 would wait in vain for one that is gone."""


def open_store(
    world: World, *, join_s: float, timeout_s: int, should_leave: ShouldLeave = never,
    last_word_s: float = _LAST_WORD_S, environment: Mapping[str, str] | None = None,
) -> Store:  # fmt: skip
    """The job's store; rank 0 serves it unless the launcher does, the others connect.

    Hand it to `torch.distributed.init_process_group(store=...)`.

    Args:
        world: this process's place; `master_port` must be free on rank 0's host.
        join_s: longest wait for whoever serves, in seconds.
        timeout_s: longest wait of a later question to the store, in seconds.
        should_leave: asked about once a second while waiting.
        last_word_s: how long a rank that is asked to leave still waits for whoever serves, in seconds. Those who wait for this
            rank learn from its word in the store, and from nothing else, that they need not.
        environment: defaults to the process environment.

    Raises:
        Interrupted: asked to stop while waiting, and nobody listened for a while after it.
        PeerGoneError: nobody listens, with the reason.
        RuntimeError: the port is taken; as torch's own rendezvous does.
    """
    env = os.environ if environment is None else environment
    local = world.is_on_one_host
    address = "127.0.0.1" if local else world.master_addr
    serves = world.is_first and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    handle = _listen(world.master_port) if serves and local else None
    if not serves:
        _knock(address, world.master_port, join_s=join_s, should_leave=should_leave, last_word_s=last_word_s)
    return TCPStore(
        address,
        world.master_port,
        world.size,
        serves,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=handle,
    )


def _knock(address: str, port: int, *, join_s: float, should_leave: ShouldLeave, last_word_s: float) -> None:
    """Wait until somebody listens there."""
    deadline = time.monotonic() + join_s
    asked_at: float | None = None
    while True:
        try:
            socket.create_connection((address, port), timeout=_KNOCK_S).close()
            return
        except OSError as error:
            reason = error
        now = time.monotonic()
        if asked_at is None and should_leave():
            asked_at = now
        if asked_at is not None and now - asked_at >= last_word_s:
            raise Interrupted("asked to stop while waiting for the other ranks")
        if now > deadline:
            raise PeerGoneError(
                f"rank 0 did not answer at {address}:{port} within {join_s:g} s: {_meaning(reason)}"
            ) from None
        time.sleep(_PAUSE_S)


def _meaning(reason: OSError) -> str:
    """What a failed connection says about the other side, and the fix."""
    if isinstance(reason, socket.gaierror):
        return "its name is not known here: check MASTER_ADDR, /etc/hosts and the name server of this host"
    if isinstance(reason, ConnectionRefusedError):
        return "its host is there, but rank 0 has not started or has ended: see its output"
    if isinstance(reason, TimeoutError):
        return "its host is off, cut off, or a firewall drops the connection: open the ports between the nodes"
    return f"{reason.strerror or reason}: check the network between the hosts"


def _listen(port: int) -> int:
    """A listening socket on the loopback interface; its handle belongs to whoever gets it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise RuntimeError(f"port {port} of this host cannot be listened on: {error.strerror}") from None
        return listener.detach()
