"""A disk that counts its operations and, at a chosen one, fails, takes half, lies, or kills the process.

    with operations_replaced(FaultyDisk(Fault.fails(errno.EIO), at=7)):
        ...                                   # the seventh operation raises EIO, the eighth works again

`at` counts all operations that `about` and `kinds` let through, from 1. The operations themselves are the real ones.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.file_operations import FileOperations

KINDS = (
    "create", "open_append", "open_read", "read", "write", "size", "fsync", "close", "rename", "link", "unlink",
    "make_directory", "remove_directory", "sync_directory",
)  # fmt: skip

_BY_HANDLE = ("read", "write", "size", "fsync", "close")


@dataclass(frozen=True)
class Operation:
    """What the disk was asked for."""

    kind: str
    path: str
    """The path, or the one behind the handle; both names for a rename or link."""


@dataclass(frozen=True)
class Fault:
    """What happens in place of an operation."""

    name: str
    act: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]

    @classmethod
    def fails(cls, number: int) -> Fault:
        """An OSError; the operation has not been done."""

        def act(_kind: str, _real: Callable[..., Any], _arguments: tuple[Any, ...]) -> Any:
            raise OSError(number, os.strerror(number))

        return cls(errno.errorcode[number], act)

    @classmethod
    def done_but_told_failed(cls, number: int) -> Fault:
        """An OSError after the operation was done: the answer got lost on a network file system."""

        def act(_kind: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            real(*arguments)
            raise OSError(number, os.strerror(number))

        return cls(f"{errno.errorcode[number]}-after", act)

    @classmethod
    def short(cls) -> Fault:
        """A write takes half of its bytes, at least one; other operations are as ever."""

        def act(kind: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if kind != "write":
                return real(*arguments)
            handle, data = arguments
            return real(handle, data[: max(1, data.nbytes // 2)])

        return cls("short", act)

    @classmethod
    def flips_a_bit(cls) -> Fault:
        """A write puts one other bit on the disk and says nothing."""

        def act(kind: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if kind != "write":
                return real(*arguments)
            handle, data = arguments
            changed = bytearray(data)
            changed[len(changed) // 2] ^= 4
            return real(handle, memoryview(changed))

        return cls("bit", act)

    @classmethod
    def kills(cls, *, torn: bool = False) -> Fault:
        """SIGKILL to this process: before the operation, or, of a write, after half of it."""

        def act(kind: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if torn and kind == "write":
                handle, data = arguments
                real(handle, data[: data.nbytes // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # the signal is on its way: go no further

        return cls("torn-kill" if torn else "kill", act)


class FaultyDisk(FileOperations):
    """The real disk with one fault in it.

    Attributes:
        count: operations so far that `kinds` and `about` let through.
        log: all of them, when asked for.
        hit: the operation at which the fault came, or None.
    """

    def __init__(
        self, fault: Fault | None = None, *, at: int = 0, kinds: tuple[str, ...] = KINDS, about: str = "",
        lasting: bool = False, counted: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Choose the fault.

        Args:
            fault: what happens; None only counts.
            at: number of the operation, from 1.
            kinds: operations that count.
            about: only operations whose path contains this count.
            lasting: every counted operation from `at` on fails, not only that one.
            counted: told the count before each operation, e.g. to survive a kill in shared memory.
        """
        self._fault, self._at, self._kinds, self._about, self._lasting = fault, at, kinds, about, lasting
        self._told = counted
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()
        self.count = 0
        self.log: list[Operation] = []
        self.hit: Operation | None = None

    def _meet(self, kind: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            if kind in _BY_HANDLE:
                path = self._paths.get(arguments[0], "")
            else:
                path = " ".join(str(a) for a in arguments if isinstance(a, Path))
            strikes = False
            if kind in self._kinds and self._about in path:
                self.count += 1
                operation = Operation(kind, path)
                self.log.append(operation)
                strikes = self.count == self._at or (self._lasting and 0 < self._at < self.count)
                if strikes and self.hit is None:
                    self.hit = operation
                if self._told is not None:
                    self._told(self.count)
        if strikes and self._fault is not None:
            result = self._fault.act(kind, real, arguments)
        else:
            result = real(*arguments)
        if kind in ("create", "open_append", "open_read"):
            self._paths[result] = path
        return result


def _intercepted(kind: str) -> Callable[..., Any]:
    real = getattr(FileOperations, kind)

    @functools.wraps(real)
    def method(self: FaultyDisk, *arguments: Any) -> Any:
        return self._meet(kind, functools.partial(real, self), arguments)

    return method


for _kind in KINDS:
    setattr(FaultyDisk, _kind, _intercepted(_kind))
