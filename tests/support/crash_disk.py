"""A disk that remembers what was made durable, so that a loss of power can be played at any moment of its past.

The operations are done for real below one folder and written down. `states(at)` draws what a machine may find after the
power was lost behind operation `at`:

- what was fsynced is there: a file's bytes, a folder's names;
- bytes written since may be there, be zeros, or be missing from some point on;
- changes of names since (create, rename, link, unlink, mkdir, rmdir) may be there in any subset. A rename is there whole or
  not at all; changes of one name keep their order. An fsync of a file says nothing about its name.

That is weaker than any journaling file system, on purpose: a protocol that survives here depends on none in particular.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.file_operations import FileOperations

Tree = dict[str, bytes | None]
"""Relative path → content, None for a folder; every folder before what is in it."""

_ROOT = 0


@dataclass
class _Machine:
    """Durable state and what is pending on top of it."""

    files: dict[int, bytearray] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {_ROOT: {}})
    pending_data: dict[int, list[bytes]] = field(default_factory=dict)
    pending_names: list[tuple[tuple[int, str, int | None], ...]] = field(default_factory=list)

    def apply(self, event: tuple[Any, ...]) -> None:
        kind = event[0]
        if kind == "file":
            self.files[event[1]] = bytearray()
        elif kind == "folder":
            self.folders[event[1]] = {}
        elif kind == "data":
            self.pending_data.setdefault(event[1], []).append(event[2])
        elif kind == "fsync":
            for data in self.pending_data.pop(event[1], []):
                self.files[event[1]] += data
        elif kind == "names":
            self.pending_names.append(event[1])
        elif kind == "sync_directory":
            kept = []
            for changes in self.pending_names:
                if any(folder == event[1] for folder, _, _ in changes):
                    _change(self.folders, changes)
                else:
                    kept.append(changes)
            self.pending_names = kept

    def draw(self, rng: random.Random) -> Tree:
        folders = {number: dict(names) for number, names in self.folders.items()}
        for changes, there in zip(self.pending_names, _subset(rng, len(self.pending_names))):
            if there:
                _change(folders, changes)
        lossy = rng.random()
        contents: dict[int, bytes] = {}

        def content(file: int) -> bytes:
            if file not in contents:
                contents[file] = self._content(rng, file, lossy)
            return contents[file]

        return dict(_walk(folders, content, _ROOT, ""))

    def _content(self, rng: random.Random, file: int, lossy: float) -> bytes:
        durable, pending = self.files[file], self.pending_data.get(file, [])
        data = bytearray(durable)
        for piece in pending:
            if rng.random() >= lossy:
                data += piece
            else:
                begin = rng.randrange(len(piece) + 1)
                end = rng.randrange(begin, len(piece) + 1)
                data += piece[:begin] + bytes(end - begin) + piece[end:]
        if pending and rng.random() < lossy:
            del data[rng.randrange(len(durable), len(data) + 1) :]
        return bytes(data)


class CrashDisk(FileOperations):
    """The real disk below `root`, written down.

    Attributes:
        events: what happened; `len(events)` is a moment that `states` understands.
    """

    def __init__(self, root: Path) -> None:
        """Everything that is below `root` now counts as durable."""
        self.root = root
        self.events: list[tuple[Any, ...]] = []
        self._start = _Machine()
        self._names: dict[int, dict[str, int]] = {_ROOT: {}}
        self._handles: dict[int, int] = {}
        self._numbers = 0
        self._lock = threading.RLock()
        self._take_in(root, _ROOT)

    # --- operations ---

    def create(self, path: Path) -> int:
        with self._lock:
            handle = super().create(path)
            self._handles[handle] = self._new_file(path)
            return handle

    def open_append(self, path: Path) -> int:
        with self._lock:
            known = path.exists()
            handle = super().open_append(path)
            self._handles[handle] = self._find(path) if known else self._new_file(path)
            return handle

    def write(self, handle: int, data: memoryview) -> int:
        with self._lock:
            count = super().write(handle, data)
            self.events.append(("data", self._handles[handle], bytes(data[:count])))
            return count

    def fsync(self, handle: int) -> None:
        with self._lock:
            super().fsync(handle)
            self.events.append(("fsync", self._handles[handle]))

    def close(self, handle: int) -> None:
        with self._lock:
            super().close(handle)
            self._handles.pop(handle, None)

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            super().rename(source, target)
            number = self._find(source)
            self._name((self._folder(source), source.name, None), (self._folder(target), target.name, number))

    def link(self, source: Path, target: Path) -> None:
        with self._lock:
            super().link(source, target)
            self._name((self._folder(target), target.name, self._find(source)))

    def unlink(self, path: Path) -> None:
        with self._lock:
            super().unlink(path)
            self._name((self._folder(path), path.name, None))

    def make_directory(self, path: Path) -> None:
        with self._lock:
            super().make_directory(path)
            self._numbers += 1
            self._names[self._numbers] = {}
            self.events.append(("folder", self._numbers))
            self._name((self._folder(path), path.name, self._numbers))

    def remove_directory(self, path: Path) -> None:
        with self._lock:
            super().remove_directory(path)
            self._name((self._folder(path), path.name, None))

    def sync_directory(self, path: Path) -> None:
        with self._lock:
            super().sync_directory(path)
            self.events.append(("sync_directory", self._find(path)))

    # --- power loss ---

    @property
    def moment(self) -> int:
        """Now."""
        with self._lock:
            return len(self.events)

    def states(self, rng: random.Random, *, per_moment: int) -> Iterator[tuple[int, Tree]]:
        """What may be found: for every moment from before the first event to after the last, so many draws."""
        machine = self._start
        for moment in range(len(self.events) + 1):
            if moment:
                machine.apply(self.events[moment - 1])
            for _ in range(per_moment):
                yield moment, machine.draw(rng)
        self._start = _Machine()  # used up

    def knows_all(self) -> bool:
        """Whether nothing below the root was changed behind this object's back."""
        told = set(_walk(self._names, lambda _file: b"", _ROOT, ""))
        return {name for name, _ in told} == {str(p.relative_to(self.root)) for p in self.root.rglob("*")}

    # --- bookkeeping ---

    def _take_in(self, path: Path, number: int) -> None:
        for entry in sorted(os.scandir(path), key=lambda e: e.name):
            self._numbers += 1
            child = self._numbers
            self._names[number][entry.name] = child
            self._start.folders[number][entry.name] = child
            if entry.is_dir(follow_symlinks=False):
                self._names[child], self._start.folders[child] = {}, {}
                self._take_in(Path(entry.path), child)
            else:
                self._start.files[child] = bytearray(Path(entry.path).read_bytes())

    def _new_file(self, path: Path) -> int:
        self._numbers += 1
        self.events.append(("file", self._numbers))
        self._name((self._folder(path), path.name, self._numbers))
        return self._numbers

    def _name(self, *changes: tuple[int, str, int | None]) -> None:
        self.events.append(("names", changes))
        _change(self._names, changes)

    def _folder(self, path: Path) -> int:
        return self._find(path.parent)

    def _find(self, path: Path) -> int:
        number = _ROOT
        for part in path.relative_to(self.root).parts:
            number = self._names[number][part]
        return number


def build(tree: Tree, folder: Path) -> None:
    """Make a state real in an empty folder."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def fingerprint(tree: Tree) -> bytes:
    """Equal for equal states."""
    digest = hashlib.blake2b()
    for name in sorted(tree):
        content = tree[name]
        digest.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
        digest.update(content or b"")
    return digest.digest()


def _change(folders: dict[int, dict[str, int]], changes: tuple[tuple[int, str, int | None], ...]) -> None:
    for folder, name, number in changes:
        if number is None:
            folders[folder].pop(name, None)
        else:
            folders[folder][name] = number


def _walk(folders: dict[int, dict[str, int]], content: Any, number: int, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, child in folders[number].items():
        if child in folders:
            yield prefix + name, None
            yield from _walk(folders, content, child, f"{prefix}{name}/")
        else:
            yield prefix + name, content(child)


def _subset(rng: random.Random, count: int) -> list[bool]:
    """All, none, all but one, one, or each with one probability: the corners are where protocols break."""
    choice = rng.randrange(6)
    if choice < 2:
        return [choice == 0] * count
    if choice < 4 and count:
        one = rng.randrange(count)
        return [(i == one) == (choice == 2) for i in range(count)]
    share = rng.random()
    return [rng.random() < share for _ in range(count)]
