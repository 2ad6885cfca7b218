"""Who has come to the meeting point: ranks that are missing are named after a short wait, and a rank that cannot take part says so.

Every rank leaves a word about itself in the store; rank 0 reads them and leaves one verdict, which all obey: go on, or leave
together with one message. So nobody enters a collective that another will not come to, and a stop request, a missing GPU
or a rank that was never started ends the wait of all. Knows nothing of process groups.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not list it

from dstrain.base.errors import (
    ConfigError,
    DstrainError,
    ExitCode,
    MachineError,
    PeerError,
    PeerGoneError,
    StorageError,
)
from dstrain.base.logs import get_logger
from dstrain.base.protocols import Interrupted, ShouldLeave, never
from dstrain.base.rank_hosts import describe_missing
from dstrain.base.world import World

_LOG = get_logger(__name__)
_WORD, _ARRIVED, _ALARM, _VERDICT, _LEFT = (
    f"dstrain/roll_call/{name}" for name in ("word", "arrived", "alarm", "verdict", "left")
)
_POLL_S = 0.1
_TELL_AFTER_S = 15.0
_READ_S = 3.0
"""How long rank 0, whose store goes with it, waits for those who came to read that others did not."""
_LATE_S = 20.0
"""How long it waits for all others to come and read any other bad verdict: who finds no store cannot know that it is over."""
_OWN_FAULTS = {int(kind.exit_code): kind for kind in (ConfigError, MachineError, StorageError)}
_SLACK_S = 15.0
"""How much longer than rank 0 the others wait, so that rank 0 is the one to say who is missing."""


@dataclass(frozen=True)
class Word:
    """What a rank says of itself."""

    host: str
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = ""
    """bf16, fp32 or fp16."""
    address: str = ""
    """Where other ranks would reach it; empty when that is not to be judged."""
    fault: str = ""
    """Why it cannot take part; empty when it can."""
    code: int = 0
    """The exit code of that fault."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks do now."""

    kind: str
    """go, stop, fault (of `ranks`) or absent."""
    message: str = ""
    code: int = 0
    ranks: tuple[int, ...] = ()
    """Whose fault it is."""


@dataclass(frozen=True)
class Waiting:
    """How long to wait, and what is known beforehand."""

    join_s: float
    should_leave: ShouldLeave = never
    expected: Sequence[str] = ()
    """Host of each rank, of `rank_hosts.expected_hosts`."""
    poll_s: float = _POLL_S
    late_s: float = _LATE_S


def call_roll(store: Store, world: World, word: Word, waiting: Waiting) -> None:
    """Collective over the store. Return when all ranks are there and can take part.

    Args:
        store: of this start of the job and of no other.
        world: this process's place.
        word: about this rank; with a fault in it all leave, the others as its peers.
        waiting: for how long.

    Raises:
        PeerGoneError: ranks did not come in time (on rank 0; the others raise PeerError with the same message).
        ConfigError, MachineError, StorageError: this rank cannot take part, by its word or beside the others.
        PeerError: another rank's fault.
        Interrupted: some rank was asked to stop.
        RuntimeError: the store has gone, as torch says it.
    """
    store.set(f"{_WORD}/{world.rank}", json.dumps(asdict(word)))
    own: Verdict | None = None
    if word.fault:
        own = Verdict("fault", f"rank {world.rank} on {word.host}: {word.fault}", word.code, (world.rank,))
        _raise_alarm(store, own)
    store.add(_ARRIVED, 1)
    verdict = _decide(store, world, waiting, own) if world.is_first else _await_verdict(store, world, waiting)
    if verdict.kind == "go":
        return
    if not world.is_first:
        store.add(_LEFT, 1)
    raise _error(verdict, rank=world.rank)


def judge_words(words: Sequence[Word], *, on_one_host: bool) -> Verdict:
    """What the words of all ranks amount to. Pure.

    Args:
        words: of rank 0, 1, ...
        on_one_host: whether all ranks are on one machine, where every address will do.
    """
    for rank, word in enumerate(words):
        if word.fault:
            return Verdict("fault", f"rank {rank} on {word.host}: {word.fault}", word.code, (rank,))
    without = tuple(rank for rank, word in enumerate(words) if word.device == "cpu")
    if 0 < len(without) < len(words):
        hosts = ", ".join(dict.fromkeys(words[rank].host for rank in without))
        return Verdict(
            "fault",
            f"no GPU can be used by {_ranks(without)} on {hosts}, while other ranks use theirs: run `dstrain doctor` there; leave "
            "the host out, or set engine.device: cpu for all",
            int(ExitCode.UNHEALTHY_NODE),
            without,
        )
    kinds = {word.precision: (rank, word.host) for rank, word in reversed(list(enumerate(words)))}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} on rank {rank} ({host})" for kind, (rank, host) in sorted(kinds.items()))
        message = f"engine.precision: auto means {found}: these machines differ; set it to what all of them can do"
        return Verdict("fault", message, int(ExitCode.BAD_INPUT), (0,))
    hidden = tuple(rank for rank, word in enumerate(words) if word.address.startswith("127."))
    if hidden and not on_one_host:
        word = words[hidden[0]]
        return Verdict(
            "fault",
            f"{_ranks(hidden)}: the name {word.host} means {word.address} on that host itself, where no other host reaches it: give "
            f"the name its network address in /etc/hosts there, or export GLOO_SOCKET_IFNAME=<network interface>",
            int(ExitCode.UNHEALTHY_NODE),
            hidden,
        )
    return Verdict("go")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def _decide(store: Store, world: World, waiting: Waiting, own: Verdict | None) -> Verdict:
    """Rank 0. Watch who comes, then leave the verdict; its own fault goes first, which many may share."""
    started = time.monotonic()
    told = False
    while (verdict := own or _look(store, world, waiting)) is None:
        waited = time.monotonic() - started
        if waited > waiting.join_s:
            verdict = Verdict("absent", _absent(store, world, waiting), int(ExitCode.RETRY_HERE))
            break
        if waited > _TELL_AFTER_S and not told:
            told = True
            _LOG.info("after %.0f s there is no word yet of %s", waited, _missing(store, world, waiting))
        time.sleep(waiting.poll_s)
    store.set(_VERDICT, json.dumps(asdict(verdict)))
    if verdict.kind == "absent":
        _wait_until_read(store, readers=lambda: store.add(_ARRIVED, 0) - 1, at_most_s=_READ_S)
    elif verdict.kind != "go":
        _wait_until_read(store, readers=lambda: world.size - 1, at_most_s=waiting.late_s)
    return verdict


def _look(store: Store, world: World, waiting: Waiting) -> Verdict | None:
    """The verdict, as soon as there is one."""
    if store.check([_ALARM]):
        return _read_verdict(store, _ALARM)
    if waiting.should_leave():
        return Verdict("stop", "asked to stop while waiting for the other ranks")
    if store.add(_ARRIVED, 0) < world.size:
        return None
    words = store.multi_get([f"{_WORD}/{rank}" for rank in range(world.size)])
    return judge_words([Word(**json.loads(word)) for word in words], on_one_host=world.is_on_one_host)


def _await_verdict(store: Store, world: World, waiting: Waiting) -> Verdict:
    """Not rank 0."""
    deadline = time.monotonic() + waiting.join_s + _SLACK_S
    asked = False
    while not store.check([_VERDICT]):
        if not asked and waiting.should_leave():
            asked = True
            _raise_alarm(store, Verdict("stop", f"rank {world.rank} was asked to stop before all ranks were there"))
        if time.monotonic() > deadline:
            raise PeerGoneError(f"no word of rank 0 within {waiting.join_s + _SLACK_S:g} s: see its output")
        time.sleep(waiting.poll_s)
    return _read_verdict(store, _VERDICT)


def _absent(store: Store, world: World, waiting: Waiting) -> str:
    return (
        f"{_missing(store, world, waiting)} of {world.size} did not come to {world.master_addr}:{world.master_port} within "
        f"{waiting.join_s:g} s (start.join_s): see the output of the launcher on that host, and whether the host is up and reaches "
        "this one (`dstrain doctor`); start again, without that host if need be"
    )


def _missing(store: Store, world: World, waiting: Waiting) -> str:
    heard: dict[int, str] = {}
    for rank in range(world.size):
        if store.check([key := f"{_WORD}/{rank}"]):
            heard[rank] = str(json.loads(store.get(key))["host"])
    missing = [rank for rank in range(world.size) if rank not in heard]
    return (
        describe_missing(missing, heard=heard, expected=waiting.expected, local_size=world.local_size)
        if missing
        else "no rank"
    )


def _raise_alarm(store: Store, verdict: Verdict) -> None:
    store.set(_ALARM, json.dumps(asdict(verdict)))


def _read_verdict(store: Store, key: str) -> Verdict:
    said: Mapping[str, Any] = json.loads(store.get(key))
    return Verdict(str(said["kind"]), str(said["message"]), int(said["code"]), tuple(said["ranks"]))


def _wait_until_read(store: Store, *, readers: Callable[[], int], at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    while time.monotonic() < deadline and store.add(_LEFT, 0) < readers():
        time.sleep(_POLL_S)


def _error(verdict: Verdict, *, rank: int) -> DstrainError | Interrupted:
    if verdict.kind == "stop":
        return Interrupted(verdict.message)
    if verdict.kind == "absent":
        return PeerGoneError(verdict.message) if rank == 0 else PeerError(verdict.message, exit_code=verdict.code)
    if rank in verdict.ranks:
        return _OWN_FAULTS.get(verdict.code, ConfigError)(verdict.message)
    return PeerError(verdict.message, exit_code=verdict.code)
