"""Where second copies of checkpoints lie: a folder on another disk, or an object store. One call, one thing; no threads, no policy.

A copy is committed by its manifest: in a folder by the rename of a complete staging folder, in a store by the manifest object, which is
put last and removed first. Every file is read back and hashed before that.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dstrain.base.errors import CheckpointError, DataError, StorageError
from dstrain.base.locations import RemoteUrl, parse_location
from dstrain.base.protocols import ShouldLeave, never
from dstrain.base.remote import TransientRemoteError
from dstrain.base.remote_writer import RemoteWriter, is_missing
from dstrain.base.storage import NewFile, copy_file, make_directory, publish_directory, remove_directory, write_bytes
from dstrain.checkpoint.layout import MANIFEST, published_steps, staging_folder, step_folder
from dstrain.checkpoint.manifest import CheckpointManifest, FileEntry, parse_manifest, read_manifest
from dstrain.checkpoint.publish import move_aside
from dstrain.checkpoint.rank_file import check_from_disk
from dstrain.checkpoint.reader import Checkpoint

ResultT = TypeVar("ResultT")

_PIECE_BYTES = 8 << 20
_TRIES = 5
_FIRST_PAUSE_S = 0.25
_MANIFEST_LIMIT_BYTES = 256 << 20
_SMALL_TIMEOUT_S = 60.0
_SLOWEST_BYTES_PER_S = 1e6
_STEP_NAME = re.compile(r"step-(\d{8,})")


class MirrorPlace(Protocol):
    """A place that keeps copies of checkpoints."""

    shown: str
    """Its name for people, without secrets."""

    def steps(self) -> list[int]:
        """Steps that have a folder there, newest first; they may be incomplete."""
        ...

    def complete(self, step: int) -> bool:
        """Whether a committed copy is there whose files have their sizes."""
        ...

    def put(self, source: Path, manifest: CheckpointManifest) -> None:
        """Copy a checkpoint there, read it back and commit it; one that is there already is replaced unless it is the same."""
        ...

    def get(self, step: int, staging: Path) -> None:
        """Copy a checkpoint's files into an existing local folder, manifest included; checks names and sizes as it goes."""
        ...

    def remove(self, step: int) -> None:
        """Delete a copy, whole or not."""
        ...


def open_place(location: str, *, should_leave: ShouldLeave = never) -> MirrorPlace:
    """The place that `checkpoint.mirror` names.

    Args:
        location: a folder or a URL.
        should_leave: whether the calling thread, later on, raises `Interrupted` rather than wait for a store; copies that
            other threads make behind the training are not left.

    Raises:
        ConfigError: this kind of store cannot be written, or its package is not installed.
        DataError: it is no location.
    """
    place, caller = parse_location(location), threading.get_ident()
    if not isinstance(place, RemoteUrl):
        return FolderPlace(place)
    return StorePlace(RemoteWriter(place, should_leave=lambda: threading.get_ident() == caller and should_leave()))


class FolderPlace:
    """A folder on another disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shown = str(folder)

    def steps(self) -> list[int]:
        """Steps that have a folder there, newest first."""
        return [step for step, _ in published_steps(self._folder)]

    def complete(self, step: int) -> bool:
        """Whether a copy is there whose files have their sizes."""
        try:
            return Checkpoint(step_folder(self._folder, step), trust_owner=True).manifest.step == step
        except CheckpointError:
            return False

    def put(self, source: Path, manifest: CheckpointManifest) -> None:
        """Copy, read back, publish by rename."""
        final = step_folder(self._folder, manifest.step)
        if self.complete(manifest.step) and _same_file(final / MANIFEST, source / MANIFEST):
            return
        staging = staging_folder(self._folder, manifest.step, uuid.uuid4().hex[:12])
        try:
            make_directory(staging)
            for name, entry in manifest.files.items():
                make_directory((staging / name).parent)
                _expect(copy_file(source / name, staging / name), entry, source / name)
                check_from_disk(staging / name, entry.sha256)
            write_bytes(staging / MANIFEST, _read(source / MANIFEST))
            Checkpoint(staging, trust_owner=True)
            if final.exists():
                move_aside(final)
            publish_directory(staging, final)
        finally:
            remove_directory(staging)

    def get(self, step: int, staging: Path) -> None:
        """Copy into a local folder."""
        source = step_folder(self._folder, step)
        write_bytes(staging / MANIFEST, _read(source / MANIFEST))
        for name, entry in read_manifest(staging).files.items():
            make_directory((staging / name).parent)
            _expect(copy_file(source / name, staging / name), entry, source / name)

    def remove(self, step: int) -> None:
        """Delete a copy."""
        remove_directory(step_folder(self._folder, step))


class StorePlace:
    """A folder in an object store."""

    def __init__(self, store: RemoteWriter) -> None:
        self._store = store
        self.shown = str(store.url)

    def steps(self) -> list[int]:
        """Steps that have objects there, newest first."""
        names = self._again(lambda: self._store.names(timeout_s=_SMALL_TIMEOUT_S))
        return sorted((int(m[1]) for name in names if (m := _STEP_NAME.fullmatch(name))), reverse=True)

    def complete(self, step: int) -> bool:
        """Whether the manifest is there and every object has its size."""
        manifest = self._manifest(step)
        if manifest is None:
            return False
        try:
            return manifest.step == step and all(
                self._size(step, name) == entry.size_bytes for name, entry in manifest.files.items()
            )
        except DataError as error:
            if is_missing(error):
                return False
            raise StorageError(str(error)) from None

    def put(self, source: Path, manifest: CheckpointManifest) -> None:
        """Put every file, read it back, then the manifest."""
        text = _read(source / MANIFEST)
        step = manifest.step
        if self._text(step) == text and self.complete(step):
            return
        self._call(lambda: self._at(step)[0].remove(MANIFEST, timeout_s=_SMALL_TIMEOUT_S))
        for name, entry in manifest.files.items():
            self._put_file(step, name, source / name, entry)
        folder, name = self._at(step)
        self._call(lambda: folder.put_bytes(MANIFEST, text, timeout_s=_SMALL_TIMEOUT_S))
        if self._text(step) != text:
            raise StorageError(f"{self.shown}/{folder.url.path.rpartition('/')[2]}/{MANIFEST}: reads back differently")

    def get(self, step: int, staging: Path) -> None:
        """Read the manifest, then every file that it names."""
        text = self._text(step)
        if text is None:
            raise CheckpointError(f"{self.shown}: holds no whole checkpoint of step {step}: its manifest is not there")
        write_bytes(staging / MANIFEST, text)
        for name, entry in read_manifest(staging).files.items():
            make_directory((staging / name).parent)
            file = NewFile(staging / name)
            try:
                self._each_piece(step, name, entry.size_bytes, file.write)
                _expect(file.finish(), entry, f"{self.shown}: {name} of step {step}")
            finally:
                file.abandon()

    def remove(self, step: int) -> None:
        """Delete a copy: its manifest first, so that it is never taken for whole, then all that lies there."""
        folder, _ = self._at(step)
        self._call(lambda: folder.remove(MANIFEST, timeout_s=_SMALL_TIMEOUT_S))
        for where in (folder.inside("tokenizer"), folder):
            for name in self._call(partial(where.names, timeout_s=_SMALL_TIMEOUT_S)):
                self._call(partial(where.remove, name, timeout_s=_SMALL_TIMEOUT_S))

    def _at(self, step: int, name: str = "") -> tuple[RemoteWriter, str]:
        """The store's folder of a file, and its plain name there."""
        folder = self._store.inside(step_folder(Path(), step).name)
        head, slash, tail = name.rpartition("/")
        return (folder.inside(head) if slash else folder), tail

    def _put_file(self, step: int, name: str, source: Path, entry: FileEntry) -> None:
        folder, plain = self._at(step, name)
        timeout_s = _SMALL_TIMEOUT_S + entry.size_bytes / _SLOWEST_BYTES_PER_S
        self._call(lambda: folder.put(plain, source, timeout_s=timeout_s))
        digest = hashlib.sha256()
        if self._call(lambda: folder.size(plain, timeout_s=_SMALL_TIMEOUT_S)) == entry.size_bytes:
            self._each_piece(step, name, entry.size_bytes, digest.update)
        _expect(digest.hexdigest(), entry, f"{self.shown}: {name} of step {step}")

    def _each_piece(self, step: int, name: str, size_bytes: int, take: Callable[[bytes], Any]) -> None:
        folder, plain = self._at(step, name)
        for at in range(0, size_bytes, _PIECE_BYTES):
            count = min(_PIECE_BYTES, size_bytes - at)
            take(self._call(partial(folder.read_range, plain, at, count, timeout_s=_SMALL_TIMEOUT_S)))

    def _size(self, step: int, name: str) -> int:
        folder, plain = self._at(step, name)
        return self._again(lambda: folder.size(plain, timeout_s=_SMALL_TIMEOUT_S))

    def _text(self, step: int) -> bytes | None:
        """The manifest object's bytes, None when it is not there."""
        folder, _ = self._at(step)
        try:
            size = self._again(lambda: folder.size(MANIFEST, timeout_s=_SMALL_TIMEOUT_S))
            if size > _MANIFEST_LIMIT_BYTES:
                raise CheckpointError(f"{folder.url}/{MANIFEST}: {size} bytes, refused as a manifest")
            return self._again(lambda: folder.read_range(MANIFEST, 0, size, timeout_s=_SMALL_TIMEOUT_S))
        except DataError as error:
            if is_missing(error):
                return None
            raise StorageError(str(error)) from None

    def _manifest(self, step: int) -> CheckpointManifest | None:
        text = self._text(step)
        try:
            return None if text is None else parse_manifest(json.loads(text), MANIFEST)
        except (ValueError, RecursionError, CheckpointError):
            return None

    def _call(self, action: Callable[[], ResultT]) -> ResultT:
        try:
            return self._again(action)
        except DataError as error:
            raise StorageError(str(error)) from None

    def _again(self, action: Callable[[], ResultT]) -> ResultT:
        """Several tries at growing distances; every action here may be repeated."""
        for attempt in range(_TRIES):
            try:
                return action()
            except TransientRemoteError as error:
                if attempt == _TRIES - 1:
                    raise StorageError(f"{self.shown}: given up after {_TRIES} tries: {error}") from None
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("a loop of tries returns or raises")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _same_file(one: Path, other: Path) -> bool:
    return _read(one) == _read(other)


def _expect(found: str, entry: FileEntry, where: Path | str) -> None:
    if found != entry.sha256:
        raise CheckpointError(f"{where}: content differs from its manifest (SHA-256)")
