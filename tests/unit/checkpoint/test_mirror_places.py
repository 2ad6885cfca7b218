"""A copy is whole or not there, in a folder as in a store, and comes back bit for bit."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstrain.base.errors import CheckpointError, ConfigError, DstrainError, StorageError
from dstrain.base.file_operations import FileOperations, operations_replaced
from dstrain.base.protocols import Interrupted
from dstrain.base.remote import TransientRemoteError
from dstrain.base.remote_writer import RemoteWriter
from dstrain.checkpoint import mirror_places
from dstrain.checkpoint.manifest import read_manifest, sealed
from dstrain.checkpoint.mirror_places import FolderPlace, MirrorPlace, StorePlace, open_place
from tests.support.object_stores import object_store
from tests.support.tiny_checkpoints import content, save

Deface = Callable[[str, bytes | None], None]
"""Replace, or remove, a file of step 3's copy behind the place's back."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "tok").mkdir()
    (folder / "tok" / "tokenizer.json").write_text("{}")
    for step in (3, 5):
        save(folder / "checkpoints", step, tokenizer=folder / "tok")
    return folder / "checkpoints"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[MirrorPlace, Deface]]:
    if request.param == "folder":
        root = tmp_path / "mirror"

        def deface(name: str, data: bytes | None) -> None:
            path = root / "step-00000003" / name
            path.unlink() if data is None else path.write_bytes(data)

        yield open_place(str(root)), deface
        return
    (tmp_path / "origin").mkdir()
    with object_store("s3", tmp_path / "origin") as store, store.at(store.port) as url:
        opened = open_place(f"{url}/{tmp_path.name}")  # the server keeps what earlier tests have put
        assert isinstance(opened, StorePlace)
        writer: RemoteWriter = opened._store

        def deface_object(name: str, data: bytes | None) -> None:
            folder = writer.inside("step-00000003")
            folder.remove(name, timeout_s=20) if data is None else folder.put_bytes(name, data, timeout_s=20)

        yield opened, deface_object


def put(place: MirrorPlace, source: Path, step: int) -> None:
    folder = source / f"step-{step:08d}"
    place.put(folder, read_manifest(folder))


def test_a_copy_comes_back_bit_for_bit(place: tuple[MirrorPlace, Deface], source: Path, tmp_path: Path) -> None:
    there, _ = place
    assert there.steps() == []
    for step in (3, 5, 5):
        put(there, source, step)
    assert there.steps() == [5, 3]
    assert there.complete(3)
    assert not there.complete(4)
    (tmp_path / "back").mkdir()
    there.get(3, tmp_path / "back")
    assert content(tmp_path / "back") == content(source / "step-00000003")


def test_a_removed_copy_is_gone(place: tuple[MirrorPlace, Deface], source: Path, tmp_path: Path) -> None:
    there, _ = place
    put(there, source, 3)
    there.remove(3)
    there.remove(3)
    assert there.steps() == []
    with pytest.raises(DstrainError):
        there.get(3, tmp_path)


TENSORS = "rank-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    ("name", "data"), [(TENSORS, None), (TENSORS, b"short"), ("config.yaml", b"seed: 7"), ("manifest.json", None),
                       ("manifest.json", b"garbage")],
)  # fmt: skip
def test_a_torn_copy_does_not_count_and_is_replaced(
    place: tuple[MirrorPlace, Deface], source: Path, tmp_path: Path, name: str, data: bytes | None
) -> None:
    there, deface = place
    put(there, source, 3)
    deface(name, data)
    assert not there.complete(3)
    (tmp_path / "back").mkdir()
    with pytest.raises(DstrainError):
        there.get(3, tmp_path / "back")
    put(there, source, 3)
    assert there.complete(3)


def test_a_flipped_bit_is_found_when_the_copy_comes_back(
    place: tuple[MirrorPlace, Deface], source: Path, tmp_path: Path
) -> None:
    there, deface = place
    put(there, source, 3)
    data = bytearray((source / "step-00000003" / TENSORS).read_bytes())
    data[-1] ^= 1
    deface(TENSORS, bytes(data))
    (tmp_path / "back").mkdir()
    with pytest.raises(CheckpointError, match="content differs from its manifest"):
        there.get(3, tmp_path / "back")


def test_a_hostile_manifest_names_no_file_outside(
    place: tuple[MirrorPlace, Deface], source: Path, tmp_path: Path
) -> None:
    there, deface = place
    put(there, source, 3)
    manifest = json.loads((source / "step-00000003" / "manifest.json").read_text())
    manifest["files"]["../../escaped"] = manifest["files"].pop("config.yaml")
    deface("manifest.json", json.dumps(sealed(manifest)).encode())
    (tmp_path / "a" / "back").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="refused file name"):
        there.get(3, tmp_path / "a" / "back")


def test_what_has_another_hash_than_the_manifest_is_not_copied(
    place: tuple[MirrorPlace, Deface], tmp_path: Path
) -> None:
    there, _ = place
    folder = save(tmp_path / "local", 7)
    (folder / "config.yaml").write_text("seed: 8\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml.*content differs"):
        put(there, tmp_path / "local", 7)
    assert not there.complete(7)


def test_a_full_disk_leaves_no_half_copy(source: Path, tmp_path: Path) -> None:
    class Full(FileOperations):
        def write(self, handle: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "full")

    there = FolderPlace(tmp_path / "mirror")
    with operations_replaced(Full()), pytest.raises(StorageError, match="the disk is full"):
        put(there, source, 3)
    assert list((tmp_path / "mirror").iterdir()) == []


def test_a_store_is_asked_again_and_given_up_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_places, "_FIRST_PAUSE_S", 0.0)

    class Shaky(RemoteWriter):
        def __init__(self, failures: int) -> None:
            self.url = "s3://bucket/run"  # type: ignore[assignment]
            self.failures = failures

        def names(self, *, timeout_s: float) -> list[str]:
            self.failures -= 1
            if self.failures >= 0:
                raise TransientRemoteError("503")
            return ["step-00000003", "notes", "step-00000012"]

    assert StorePlace(Shaky(4)).steps() == [12, 3]
    with pytest.raises(StorageError, match="given up after 5 tries: 503"):
        StorePlace(Shaky(5)).steps()


def test_who_is_asked_to_stop_does_not_wait_for_a_mirror_but_its_background_copies_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "test")
        place = open_place("s3://bucket/run", should_leave=lambda: True)
        begin = time.monotonic()
        with pytest.raises(Interrupted):
            place.steps()
        assert time.monotonic() - begin < 30  # one try alone may take a minute
    assert isinstance(place, StorePlace)
    elsewhere: list[bool] = []
    thread = threading.Thread(target=lambda: elsewhere.append(place._store._should_leave()))
    thread.start()
    thread.join()
    assert elsewhere == [False]


def test_a_server_that_takes_no_files_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        open_place("https://host/folder")
