"""Several ranks without torch.distributed: threads of this process, or forked processes that can be killed.

Both speak through a control plane that has the real one's interface and rules: collective, in order, and broken for
everyone when one rank is gone.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.base.control import ControlPlane
from dstrain.base.errors import DstrainError
from dstrain.base.world import World

_SLOTS = 64


class _SimulatedControl(ControlPlane):
    def __init__(self, world: World) -> None:
        super().__init__(World())
        self.world = world

    def sum(self, numbers: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self.gather_json(list(numbers)))]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather_json(list(numbers)))]


class _ThreadControl(_SimulatedControl):
    def __init__(self, world: World, barrier: threading.Barrier, board: list[Any]) -> None:
        super().__init__(world)
        self._barrier, self._board = barrier, board

    def gather_json(self, value: Any) -> list[Any]:
        self._board[self.world.rank] = json.dumps(value)
        self._barrier.wait(60)
        values = [json.loads(text) for text in self._board]
        self._barrier.wait(60)
        return values


def run_threads(world_size: int, job: Callable[[ControlPlane], Any]) -> list[Any]:
    """Run a job on every rank of a world, each rank a thread; returns results or exceptions in rank order."""
    if world_size == 1:
        return [_result(job, ControlPlane(World()))]
    barrier, board = threading.Barrier(world_size), [""] * world_size
    results: list[Any] = [None] * world_size

    def rank_main(rank: int) -> None:
        results[rank] = _result(job, _ThreadControl(World(rank, world_size), barrier, board))
        if isinstance(results[rank], Exception) and not isinstance(results[rank], DstrainError):
            barrier.abort()  # the others would wait for it; a fault that all agree on ends them all

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def _result(job: Callable[[ControlPlane], Any], control: ControlPlane) -> Any:
    try:
        return job(control)
    except Exception as error:  # noqa: BLE001  (handed to the test)
        return error


class _SocketControl(_SimulatedControl):
    """Rank 0 holds one socket to each other rank; the others one to rank 0."""

    def __init__(self, world: World, peers: list[socket.socket]) -> None:
        super().__init__(world)
        self._peers = peers

    def gather_json(self, value: Any) -> list[Any]:
        if self.world.size == 1:
            return [json.loads(json.dumps(value))]
        if self.world.is_first:
            values = [value, *(_receive(peer) for peer in self._peers)]
            for peer in self._peers:
                _send(peer, values)
            return [json.loads(json.dumps(v)) for v in values]
        _send(self._peers[0], value)
        return list(_receive(self._peers[0]))


def _send(peer: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    peer.sendall(struct.pack("<I", len(data)) + data)


def _receive(peer: socket.socket) -> Any:
    return json.loads(_exactly(peer, struct.unpack("<I", _exactly(peer, 4))[0]))


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            raise ConnectionError("a peer is gone")
        data += more
    return data


@dataclass(frozen=True)
class Ended:
    """How the ranks of a forked world ended."""

    codes: list[int]
    """Exit codes; negative for a signal."""
    marks: list[int]
    """What each rank last put into its slot of shared memory."""

    @property
    def ok(self) -> bool:
        """Whether all came through."""
        return all(code == 0 for code in self.codes)


def fork_ranks(
    world_size: int, job: Callable[[ControlPlane, Callable[[int], None]], None], *, rng: random.Random,
    kill: Callable[[random.Random], tuple[float, list[int]]] | None = None, limit_s: float = 60.0,
) -> Ended:  # fmt: skip
    """Run a job on every rank, each rank a child process, and reap them all.

    When a rank dies of a signal, the others are killed within 5 ms, as a launcher would.

    Args:
        world_size: ranks.
        job: gets its control plane and a function that leaves a number in memory which survives the process.
        rng: decides how soon the others are killed.
        kill: draws (seconds from the start, ranks to kill); None kills nobody.
        limit_s: kill them all, and raise, after this long.
    """
    pairs = [socket.socketpair() for _ in range(world_size - 1)]
    marks = mmap.mmap(-1, 8 * _SLOTS)
    gc.freeze()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _child(World(rank, world_size), pairs, marks, job)
        pids.append(pid)
    gc.unfreeze()
    for pair in pairs:
        for end in pair:
            end.close()
    codes = _reap(pids, rng, kill, limit_s)
    found = [struct.unpack_from("<q", marks, 8 * rank)[0] for rank in range(world_size)]
    marks.close()
    return Ended(codes, found)


def _child(world: World, pairs: list[Any], marks: mmap.mmap, job: Callable[..., None]) -> None:
    code = 1
    try:
        if world.is_first:
            mine, others = [a for a, _ in pairs], [b for _, b in pairs]
        else:
            mine = [pairs[world.rank - 1][1]]
            others = [end for pair in pairs for end in pair if end is not mine[0]]
        for end in others:
            end.close()
        job(_SocketControl(world, mine), lambda mark: struct.pack_into("<q", marks, 8 * world.rank, mark))
        code = 0
    except DstrainError as error:
        code = int(error.exit_code)
    except ConnectionError:
        code = 3
    except BaseException:  # noqa: BLE001  (nothing of the test process may run in this copy of it)
        traceback.print_exc()
    finally:
        os._exit(code)


def _reap(pids: list[int], rng: random.Random, kill: Any, limit_s: float) -> list[int]:
    alive = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    codes = [0] * len(pids)
    started = time.monotonic()
    deadline = started + limit_s
    delay, victims = kill(rng) if kill is not None else (0.0, [])
    kill_at = started + delay if victims else deadline
    poll = select.poll()
    for handle in alive:
        poll.register(handle, select.POLLIN)
    while alive:
        pause = max(0.0, min(kill_at, deadline) - time.monotonic())
        for handle, _ in poll.poll(pause * 1000):
            rank = alive.pop(handle)
            poll.unregister(handle)
            os.close(handle)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
            if codes[rank] < 0:
                kill_at, victims = time.monotonic() + rng.random() * 0.005, list(range(len(pids)))
        now = time.monotonic()
        if now >= kill_at:
            for handle, rank in alive.items():
                if rank in victims or now >= deadline:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            kill_at = deadline + limit_s
    if time.monotonic() > deadline:
        raise TimeoutError(f"ranks did not end within {limit_s} s: exit codes {codes}")
    return codes
