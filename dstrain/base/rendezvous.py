"""Where the ranks of one host meet: torch's key-value store on a socket that only this machine can reach.

torch's own rendezvous lets its store listen on every interface, and whoever reaches the store can write what ranks read.
Given a socket that listens already, the store keeps to it. Several hosts, and torchrun, whose agent owns the store, are
left to torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from dstrain.base.world import World

_BACKLOG = 512


def loopback_store(world: World, *, timeout_s: int, environment: Mapping[str, str] | None = None) -> Store | None:
    """The store of a job on one host; rank 0 serves it on 127.0.0.1, the others connect.

    Hand it to `torch.distributed.init_process_group(store=...)`.

    Args:
        world: this process's place; `master_port` must be free on rank 0's host.
        timeout_s: longest wait for the other ranks.
        environment: defaults to the process environment.

    Returns:
        None where ranks may be on several hosts or the launcher serves the store.

    Raises:
        RuntimeError: the port is taken, or rank 0 was not reached in time; as torch's own rendezvous does.
    """
    env = os.environ if environment is None else environment
    if not world.is_on_one_host or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    handle = _listen(world.master_port) if world.is_first else None
    return TCPStore(
        "127.0.0.1",
        world.master_port,
        world.size,
        world.is_first,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=handle,
    )


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
