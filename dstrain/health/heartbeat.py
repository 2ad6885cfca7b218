"""A rank's sign of life: where its main thread is, in a page of memory that another process can read.

The rank writes a few numbers at each change of phase, about a microsecond and no system call; its watchdog maps the same
anonymous memory and reads them without asking. Only the thread that made the heartbeat counts: a hung main thread must not
look alive because a helper thread still runs. Judges nothing and writes no file. Standard library only.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum


class Phase(str, Enum):
    """What a rank is busy with, in the order in which one and the same step goes through them."""

    START_UP = "start_up"
    """Imports, configuration, model, index of the data."""
    RENDEZVOUS = "rendezvous"
    """Joining the other ranks."""
    RESTORE = "restore"
    """Reading a checkpoint."""
    EVALUATE = "evaluate"
    """Scoring held-out data after `step` steps."""
    SAVE = "save"
    """Saving the state after `step` steps."""
    DATA = "data"
    """Waiting for the data of the next step."""
    FIRST_STEP = "first_step"
    """The first optimizer step of this process, with compilation and warm-up."""
    STEP = "step"
    """An optimizer step."""
    FINISH = "finish"
    """After the last step: predictions, export, closing."""


PLACE: dict[str, int] = {phase: place for place, phase in enumerate(Phase)}
"""Place of a phase in that order; its plain name is as good a key."""


class Ended(IntEnum):
    """How the watched part of the program ended."""

    RUNNING = 0
    CLEANLY = 1
    BY_A_FAULT = 2
    """Of its own, or one that all ranks have agreed on."""
    BY_A_LOST_PEER = 3
    """Another rank was gone: whatever happened did not begin here."""


RECENT_STEPS = 64
_STEP = PLACE[Phase.STEP]
_PHASES = tuple(Phase)
_COUNTER = struct.Struct("=Q")
_HEAD = struct.Struct("=iiqqq")  # after it: phase, ended, step, monotonic ns of the last progress, steps timed
_NUMBER = struct.Struct("=q")
_LONGEST = struct.Struct(f"={len(Phase)}q")
_RECENT = struct.Struct(f"={RECENT_STEPS}q")
_LONGEST_AT = _COUNTER.size + _HEAD.size
_RECENT_AT = _LONGEST_AT + _LONGEST.size
SIZE_BYTES = _RECENT_AT + _RECENT.size
CHECK_EVERY_NS = 10_000_000_000


@dataclass(frozen=True)
class Beat:
    """One reading of a heartbeat."""

    counter: int
    """Grows with every sign of progress."""
    phase: Phase
    step: int
    """Optimizer steps done when the phase began."""
    stamp_ns: int
    """CLOCK_MONOTONIC at the last progress, the same clock for all processes of a host."""
    ended: Ended
    longest_s: tuple[float, ...]
    """Longest completed stay in each phase so far, seconds."""
    recent_steps_s: tuple[float, ...]
    """Seconds of the last steps, at most `RECENT_STEPS`, in no order; the first step is not among them."""


class Heartbeat:
    """The rank's side; made by the main thread, which alone is listened to."""

    def __init__(self, *, on_check: Callable[[], None] | None = None) -> None:
        """Start in START_UP.

        Args:
            on_check: called by `enter` at most every ten seconds (is the watchdog still there?).
        """
        self.descriptor = os.memfd_create("dstrain-heartbeat", os.MFD_CLOEXEC)
        """File descriptor of the memory, to hand to the process that reads."""
        os.ftruncate(self.descriptor, SIZE_BYTES)
        self._memory = mmap.mmap(self.descriptor, SIZE_BYTES)
        self._owner = threading.get_ident()
        self._on_check = on_check
        self._counter = 0
        self._place, self._step = PLACE[Phase.START_UP], 0
        self._since = self._checked = time.monotonic_ns()
        self._longest = [0] * len(Phase)
        self._timed = 0
        self._closed = False
        self._write(Ended.RUNNING)

    def enter(self, phase: str, step: int) -> None:
        """Say that the main thread begins a phase; entering the same phase again is progress, too.

        Args:
            phase: a `Phase` or its value.
            step: optimizer steps done.
        """
        if threading.get_ident() != self._owner or self._closed:
            return
        now = time.monotonic_ns()
        self._account(now - self._since)
        self._place, self._step, self._since = PLACE[phase], step, now
        self._write(Ended.RUNNING)
        if self._on_check is not None and now - self._checked > CHECK_EVERY_NS:
            self._checked = now
            self._on_check()

    def close(self, ended: Ended = Ended.CLEANLY) -> None:
        """Say that nobody need watch any more.

        Args:
            ended: how the program leaves; after anything but a clean end its peers may not know yet.
        """
        if not self._closed:
            self._write(ended)
            self._closed = True
            self._memory.close()
            os.close(self.descriptor)

    def _account(self, spent_ns: int) -> None:
        place = self._place
        if spent_ns > self._longest[place]:
            self._longest[place] = spent_ns
            _NUMBER.pack_into(self._memory, _LONGEST_AT + 8 * place, spent_ns)
        if place == _STEP:
            _NUMBER.pack_into(self._memory, _RECENT_AT + 8 * (self._timed % RECENT_STEPS), spent_ns)
            self._timed += 1

    def _write(self, ended: Ended) -> None:
        # An odd counter says "being written": the reader looks again. So does zero, which packing passes through.
        self._counter += 2
        _COUNTER.pack_into(self._memory, 0, self._counter - 1)
        _HEAD.pack_into(self._memory, _COUNTER.size, self._place, ended, self._step, self._since, self._timed)
        _COUNTER.pack_into(self._memory, 0, self._counter)


class HeartbeatReader:
    """The watchdog's side of the same memory."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE_BYTES, prot=mmap.PROT_READ)
        self._whole: bytes | None = None

    def read(self) -> Beat:
        """What the rank wrote last, or what it wrote before while it is in the middle of writing (or died there)."""
        for _ in range(10):
            data = self._memory[:]
            counter = _COUNTER.unpack_from(data)[0]
            if counter and counter % 2 == 0 and data[:8] == self._memory[:8]:
                self._whole = data
                break
        data = self._whole or data
        (counter,) = _COUNTER.unpack_from(data)
        place, ended, step, stamp, timed = _HEAD.unpack_from(data, _COUNTER.size)
        recent = _RECENT.unpack_from(data, _RECENT_AT)[: min(timed, RECENT_STEPS)]
        return Beat(
            counter=counter,
            phase=_PHASES[place],
            step=step,
            stamp_ns=stamp,
            ended=Ended(ended),
            longest_s=tuple(n / 1e9 for n in _LONGEST.unpack_from(data, _LONGEST_AT)),
            recent_steps_s=tuple(n / 1e9 for n in recent),
        )
