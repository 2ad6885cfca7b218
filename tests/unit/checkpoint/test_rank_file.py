"""One rank's file is durable, hashed and read back, or it is not there."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from dstrain.base.errors import StorageError
from dstrain.base.file_operations import FileOperations, operations_replaced
from dstrain.base.storage import NotDurableError
from dstrain.checkpoint import rank_file
from dstrain.checkpoint.rank_file import SaveCancelledError, check_from_disk, drop_cached, is_full, write_part
from dstrain.checkpoint.snapshot import Snapshot
from tests.support.tiny_checkpoints import fragments_of, state_of


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    monkeypatch.setattr(rank_file, "_PIECE_BYTES", 16)
    snapshot = Snapshot()
    snapshot.take(fragments_of(state_of(1)))
    return snapshot


def test_the_part_says_what_is_on_the_disk(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "rank-00000-of-00001.safetensors"
    part = write_part(path, snapshot, verify=True, cancelled=lambda: False)
    data = path.read_bytes()
    assert data == b"".join(snapshot.pieces(1 << 20))
    assert (part.name, part.size_bytes, part.sha256) == (path.name, len(data), hashlib.sha256(data).hexdigest())
    assert part.fragments == snapshot.listing
    assert part.read_back
    assert not write_part(tmp_path / "b", snapshot, verify=False, cancelled=lambda: False).read_back


def test_a_failing_write_leaves_no_file(tmp_path: Path, snapshot: Snapshot) -> None:
    class Full(FileOperations):
        def write(self, handle: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "full")

    with operations_replaced(Full()):
        with pytest.raises(StorageError, match="the disk is full") as caught:
            write_part(tmp_path / "a", snapshot, verify=True, cancelled=lambda: False)
    assert is_full(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_write_stops_between_two_pieces_and_leaves_no_file(tmp_path: Path, snapshot: Snapshot) -> None:
    answers = iter([False, False, True])
    with pytest.raises(SaveCancelledError):
        write_part(tmp_path / "a", snapshot, verify=True, cancelled=lambda: next(answers))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_back_other_bytes_is_found_out(tmp_path: Path, snapshot: Snapshot) -> None:
    class Flipping(FileOperations):
        def write(self, handle: int, data: memoryview) -> int:
            return super().write(handle, memoryview(bytes([data[0] ^ 1]) + bytes(data[1:])))

    with operations_replaced(Flipping()):
        with pytest.raises(StorageError, match="gives back other bytes"):
            write_part(tmp_path / "a", snapshot, verify=True, cancelled=lambda: False)


def test_a_file_that_cannot_be_read_back_is_a_storage_fault(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read back"):
        check_from_disk(tmp_path / "absent", "0" * 64)


def test_forgetting_the_cached_copy_changes_no_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    drop_cached(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000


def test_only_a_lack_of_room_counts_as_full_and_never_after_a_rename() -> None:
    def caused(fault: Exception, number: int) -> Exception:
        fault.__cause__ = OSError(number, "")
        return fault

    assert is_full(caused(StorageError("x"), errno.ENOSPC))
    assert is_full(caused(StorageError("x"), errno.EDQUOT))
    assert is_full(OSError(errno.ENOSPC, ""))
    assert not is_full(caused(StorageError("x"), errno.EIO))
    assert not is_full(StorageError("x"))
    assert not is_full(caused(NotDurableError("x"), errno.ENOSPC))
