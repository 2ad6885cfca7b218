import errno
import os
import stat
import threading

import pytest

from dstrain.base import file_operations
from dstrain.base.file_operations import FileOperations, operations, operations_replaced

disk = FileOperations()


def test_a_new_file_takes_no_name_that_is_in_use_not_even_through_a_link(tmp_path):
    (tmp_path / "taken").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for name in ("taken", "dangling"):
        with pytest.raises(FileExistsError):
            disk.create(tmp_path / name)
    assert (tmp_path / "taken").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere").exists()


def test_handles_are_not_inherited_by_child_processes(tmp_path):
    (tmp_path / "old").write_bytes(b"")
    handles = [disk.create(tmp_path / "new"), disk.open_append(tmp_path / "log"), disk.open_read(tmp_path / "old")]
    assert [os.get_inheritable(handle) for handle in handles] == [False] * 3
    for handle in handles:
        disk.close(handle)


def test_bytes_go_out_and_come_back(tmp_path):
    handle = disk.create(tmp_path / "x")
    assert disk.write(handle, memoryview(b"0123456789")) == 10
    disk.fsync(handle)
    assert disk.size(handle) == 10
    disk.close(handle)
    handle = disk.open_append(tmp_path / "x")
    disk.write(handle, memoryview(b"ab"))
    disk.close(handle)
    handle = disk.open_read(tmp_path / "x")
    buffer = bytearray(8)
    assert [disk.read(handle, memoryview(buffer)) for _ in range(3)] == [8, 4, 0]
    assert bytes(buffer[:4]) == b"89ab"
    disk.close(handle)


def test_a_name_moves_over_a_file_but_a_link_needs_a_free_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        disk.link(tmp_path / "a", tmp_path / "b")
    disk.rename(tmp_path / "a", tmp_path / "b")
    disk.link(tmp_path / "b", tmp_path / "c")
    disk.unlink(tmp_path / "b")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("c", "a")]


def test_folders_are_made_synced_and_removed_one_at_a_time(tmp_path):
    disk.make_directory(tmp_path / "a")
    disk.sync_directory(tmp_path)
    assert stat.S_ISDIR((tmp_path / "a").stat().st_mode)
    with pytest.raises(FileNotFoundError):
        disk.make_directory(tmp_path / "b" / "c")
    with pytest.raises(OSError, match="not empty"):
        disk.remove_directory(tmp_path)
    disk.remove_directory(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_only_a_file_system_that_cannot_sync_folders_is_excused(number, fails, tmp_path, monkeypatch):
    closed = []
    real_close = os.close

    def refuse(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), real_close(handle)))
    if fails:
        with pytest.raises(OSError, match="Errno"):
            disk.sync_directory(tmp_path)
    else:
        disk.sync_directory(tmp_path)
    assert len(closed) == 1


def test_a_replacement_is_in_force_for_every_thread_and_only_inside_its_block():
    before = operations()
    seen = []
    with operations_replaced(FileOperations()) as outer:
        with operations_replaced(FileOperations()) as inner:
            thread = threading.Thread(target=lambda: seen.append(operations()))
            thread.start()
            thread.join()
            assert operations() is inner
        assert operations() is outer
    assert seen == [inner]
    assert operations() is before
    assert len(file_operations._in_force) == 1


def test_a_replacement_ends_with_its_block_even_when_that_fails():
    before = operations()
    with pytest.raises(RuntimeError), operations_replaced(FileOperations()):
        raise RuntimeError
    assert operations() is before
