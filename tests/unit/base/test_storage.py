import errno
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base import storage
from dstrain.base.errors import DataError, StorageError
from dstrain.base.storage import NewFile


@pytest.fixture(params=["fsync", "replace"])
def failing_disk(request, monkeypatch):
    """Make one system call fail; yields the function that sets the error number."""

    def fail_with(number):
        def refuse(*_args, **_kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, request.param, refuse)

    return fail_with


# --- small files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failing_write_leaves_the_old_content_and_nothing_beside_it(number, tmp_path, failing_disk):
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    failing_disk(number)
    with pytest.raises(StorageError, match=r"state\.json: cannot be written"):
        storage.write_bytes(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert path.read_bytes() == b"old"


def test_a_failing_first_write_leaves_nothing(tmp_path, failing_disk):
    failing_disk(errno.ENOSPC)
    with pytest.raises(StorageError, match="the disk is full: free some space"):
        storage.write_json(tmp_path / "new.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_content_is_durable_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), real_fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    storage.write_bytes(tmp_path / "x", b"data")
    assert calls == ["fsync", "replace", "fsync"]  # content, name, folder


def test_a_write_returns_the_hash_of_what_is_on_disk(tmp_path):
    digest = storage.write_text(tmp_path / "x.txt", "größer")
    assert digest == hashlib.sha256("größer".encode()).hexdigest() == storage.file_sha256(tmp_path / "x.txt")


def test_a_view_of_wide_items_is_written_whole(tmp_path):
    data = np.arange(5, dtype=np.float64)
    digest = storage.write_bytes(tmp_path / "x", data.data)
    assert (tmp_path / "x").read_bytes() == data.tobytes()
    assert digest == hashlib.sha256(data.tobytes()).hexdigest()


def test_writing_into_a_missing_folder_is_a_storage_fault(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        storage.write_bytes(tmp_path / "none" / "x", b"")


def test_permission_denied_names_the_mend(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="permission denied: choose a folder you may write to"):
        storage.write_bytes(tmp_path / "x", b"")


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=4))
def test_equal_data_gives_equal_json_bytes_whatever_its_order(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("json")
    first = storage.write_json(folder / "a", data)
    assert first == storage.write_json(folder / "b", dict(reversed(data.items())))
    assert storage.read_json(folder / "a") == data


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_file_larger_than_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + b" " * 98 + b"]")
    assert storage.read_json(path, limit_bytes=100) == []
    with pytest.raises(DataError, match="larger than 99 bytes"):
        storage.read_json(path, limit_bytes=99)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_what_is_not_json_is_a_data_fault_naming_the_file(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: not readable as JSON"):
        storage.read_json(tmp_path / "x.json")


def test_a_missing_file_and_a_folder_are_data_faults(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        storage.read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="not readable as JSON"):
        storage.read_json(tmp_path)


# --- large files ---------------------------------------------------------------------------------------------------


def test_a_new_file_counts_and_hashes_its_pieces(tmp_path):
    file = NewFile(tmp_path / "big")
    file.write(b"abc")
    file.write(np.arange(2, dtype=np.int32).data)
    assert file.size_bytes == 11
    content = b"abc" + np.arange(2, dtype=np.int32).tobytes()
    assert file.finish() == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "big").read_bytes() == content


def test_a_new_file_never_overwrites(tmp_path):
    (tmp_path / "big").write_bytes(b"mine")
    with pytest.raises(StorageError, match="File exists"):
        NewFile(tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == b"mine"


def test_a_new_file_that_cannot_be_made_durable_is_not_finished(tmp_path, monkeypatch):
    file = NewFile(tmp_path / "big")
    file.write(b"x" * 10)

    def refuse(_handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        file.finish()
    file.abandon()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"more")


def test_a_full_disk_is_told_while_writing():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        storage.append_scratch(storage.Path("/dev/full"), b"x")


def test_scratch_files_grow_at_the_end(tmp_path):
    storage.append_scratch(tmp_path / "s", b"ab")
    storage.append_scratch(tmp_path / "s", bytearray(b"cd"))
    assert (tmp_path / "s").read_bytes() == b"abcd"


# --- folders -------------------------------------------------------------------------------------------------------


def staged(tmp_path):
    staging = tmp_path / "staging"
    storage.make_directory(staging / "sub")
    (staging / "sub" / "file").write_text("x")
    return staging


def test_a_published_folder_appears_whole_under_its_final_name(tmp_path):
    storage.publish_directory(staged(tmp_path), tmp_path / "final")
    assert (tmp_path / "final" / "sub" / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_publishing_never_replaces_a_folder_with_content(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "precious").write_text("y")
    staging = staged(tmp_path)
    with pytest.raises(StorageError, match="final: cannot be written"):
        storage.publish_directory(staging, tmp_path / "final")
    assert (tmp_path / "final" / "precious").read_text() == "y"
    assert (staging / "sub" / "file").exists()


def test_a_failing_sync_publishes_nothing(tmp_path, monkeypatch):
    staging = staged(tmp_path)

    def refuse(_handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError):
        storage.publish_directory(staging, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_folder_is_renamed_away_before_its_files_go(tmp_path, monkeypatch):
    folder = staged(tmp_path)
    seen = []
    monkeypatch.setattr(storage.shutil, "rmtree", lambda path, **_: seen.append((path, folder.exists())))
    storage.remove_directory(folder)
    [(doomed, still_there)] = seen
    assert not still_there
    assert doomed.name.startswith(".deleting-staging-")


def test_a_removed_folder_leaves_nothing_and_a_missing_one_is_no_fault(tmp_path):
    storage.remove_directory(staged(tmp_path))
    storage.remove_directory(tmp_path / "staging")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_cannot_be_made_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.make_directory(tmp_path / "file" / "sub")


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    real = storage.shutil.disk_usage
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: (asked.append(path), real(path))[1])
    assert storage.free_bytes(tmp_path / "a" / "b") > 0
    assert asked == [tmp_path]
