import errno
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base import storage
from dstrain.base.errors import DataError, ExitCode, StorageError
from dstrain.base.file_operations import FileOperations
from dstrain.base.storage import NewFile


@pytest.fixture(params=["fsync", "replace"])
def failing_disk(request, monkeypatch):
    """Make one system call fail; yields the function that sets the error number."""

    def fail_with(number):
        def refuse(*_args, **_kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, request.param, refuse)

    return fail_with


class Recorded(FileOperations):
    """The real disk; keeps the order of calls. What has a random name is kept without it."""

    def __init__(self):
        self.calls = []

    def create(self, path):
        self.calls.append("create")
        return super().create(path)

    def write(self, handle, data):
        self.calls.append(f"write {data.nbytes}")
        return super().write(handle, data)

    def fsync(self, handle):
        self.calls.append("fsync")
        super().fsync(handle)

    def close(self, handle):
        self.calls.append("close")
        super().close(handle)

    def rename(self, source, target):
        self.calls.append(f"rename {source.name}" if not source.name.startswith(".") else "rename")
        super().rename(source, target)

    def link(self, source, target):
        self.calls.append("link")
        super().link(source, target)

    def unlink(self, path):
        self.calls.append(f"unlink {path.name}" if not path.name.startswith(".") else "unlink")
        super().unlink(path)

    def make_directory(self, path):
        self.calls.append(f"make_directory {path.name}")
        super().make_directory(path)

    def remove_directory(self, path):
        self.calls.append("remove_directory")
        super().remove_directory(path)

    def sync_directory(self, path):
        self.calls.append(f"sync_directory {path.name}")
        super().sync_directory(path)


class Failing(FileOperations):
    """The real disk until the named call, which fails every time."""

    def __init__(self, name, number):
        def refuse(*_args):
            self.refused += 1
            raise OSError(number, os.strerror(number))

        self.refused = 0
        setattr(self, name, refuse)


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


def test_content_is_durable_before_it_gets_its_name_and_the_name_before_it_is_reported(tmp_path):
    with storage.operations_replaced(Recorded()) as disk:
        storage.write_bytes(tmp_path / "x", b"data")
    assert disk.calls == ["create", "write 4", "fsync", "close", "rename", f"sync_directory {tmp_path.name}"]


def test_content_in_place_whose_name_is_not_durable_is_told_apart(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with storage.operations_replaced(Failing("sync_directory", errno.EIO)):
        with pytest.raises(storage.NotDurableError, match="x: is in place, but its folder could not be synced"):
            storage.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_file_is_never_synced_again_after_a_failed_sync(tmp_path):
    with storage.operations_replaced(Failing("fsync", errno.EIO)) as disk:
        with pytest.raises(StorageError):
            storage.write_bytes(tmp_path / "x", b"new")
    assert disk.refused == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [1, 3, 10])
def test_short_writes_are_carried_on(taken, tmp_path):
    class Short(FileOperations):
        def write(self, handle, data):
            return super().write(handle, data[:taken])

    with storage.operations_replaced(Short()):
        digest = storage.write_bytes(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert digest == hashlib.sha256(b"0123456789").hexdigest()


@pytest.mark.parametrize("answer", [0, -1, 11])
def test_a_write_that_takes_nothing_or_lies_is_a_fault_and_no_endless_loop(answer, tmp_path):
    class Stuck(FileOperations):
        def write(self, handle, data):
            return answer

    with storage.operations_replaced(Stuck()), pytest.raises(StorageError, match="input/output error"):
        storage.write_bytes(tmp_path / "x", b"0123456789")
    assert list(tmp_path.iterdir()) == []


def test_a_file_shorter_than_what_was_written_is_a_fault(tmp_path):
    class Forgetful(FileOperations):
        def write(self, handle, data):
            return super().write(handle, data[:-1]) + 1

    with storage.operations_replaced(Forgetful()), pytest.raises(StorageError):
        storage.write_bytes(tmp_path / "x", b"0123456789")
    assert list(tmp_path.iterdir()) == []


MENDS = {
    errno.ENOSPC: "free some space", errno.EDQUOT: "quota is used up", errno.EROFS: "choose another folder",
    errno.EACCES: "you may write to", errno.EIO: "kernel log", errno.ESTALE: "mount it again", errno.EFBIG: "ulimit -f",
}  # fmt: skip


@pytest.mark.parametrize("number", MENDS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["create", "write", "fsync", "close", "rename"])
def test_every_storage_error_names_the_file_and_its_mend(call, number, tmp_path):
    with storage.operations_replaced(Failing(call, number)):
        with pytest.raises(StorageError, match=rf"/x: cannot be written: .*{MENDS[number]}"):
            storage.write_bytes(tmp_path / "x", b"new")
    assert not (tmp_path / "x").exists()


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


@pytest.mark.parametrize(
    ("name", "mend"), [("file/x", "a part of this path is a file"), ("n" * 300, "choose a shorter one")]
)
def test_a_wrong_name_is_no_passing_fault(name, mend, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=mend) as caught:
        storage.make_directory(tmp_path / name)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert StorageError.exit_code == ExitCode.RETRY_HERE


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


def test_a_pipe_in_the_place_of_json_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(DataError, match="it is not a file"):
        storage.read_json(tmp_path / "x.json")


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
    with pytest.raises(StorageError, match="input/output error"):
        file.finish()
    file.abandon()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"more")


def test_a_large_piece_is_written_in_chunks_without_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 4)
    seen = []

    class Watching(FileOperations):
        def write(self, handle, data):
            seen.append((data.obj, data.nbytes))
            return super().write(handle, data)

    piece = np.arange(10, dtype=np.uint8)
    with storage.operations_replaced(Watching()):
        file = NewFile(tmp_path / "big")
        file.write(piece.data)
        digest = file.finish()
    assert [size for _, size in seen] == [4, 4, 2]
    assert all(source is piece for source, _ in seen)
    assert digest == hashlib.sha256(piece.tobytes()).hexdigest()


def test_empty_pieces_of_any_shape_are_nothing(tmp_path):
    file = NewFile(tmp_path / "big")
    for nothing in (b"", np.empty((0, 3), dtype=np.float32).data):
        file.write(nothing)
    assert file.finish() == hashlib.sha256(b"").hexdigest()


def test_a_file_keeps_the_disk_it_began_with(tmp_path):
    file = NewFile(tmp_path / "big")
    with storage.operations_replaced(Failing("write", errno.EIO)):
        file.write(b"abc")
    file.finish()
    assert (tmp_path / "big").read_bytes() == b"abc"


def test_a_failed_close_is_a_fault_and_closes_once(tmp_path):
    with storage.operations_replaced(Failing("close", errno.EIO)) as disk:
        file = NewFile(tmp_path / "big")
        with pytest.raises(StorageError):
            file.finish()
        file.abandon()
    assert disk.refused == 1


def test_a_copy_is_durable_and_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 4)
    (tmp_path / "from").write_bytes(b"0123456789")
    with storage.operations_replaced(Recorded()) as disk:
        digest = storage.copy_file(tmp_path / "from", tmp_path / "to")
    assert digest == hashlib.sha256(b"0123456789").hexdigest() == storage.file_sha256(tmp_path / "to")
    assert disk.calls == ["create", "write 4", "write 4", "write 2", "fsync", "close", "close"]


@pytest.mark.parametrize("call", ["open_read", "read", "create", "write", "fsync"])
def test_a_failed_copy_leaves_no_target(call, tmp_path):
    (tmp_path / "from").write_bytes(b"0123456789")
    with storage.operations_replaced(Failing(call, errno.EIO)):
        with pytest.raises(StorageError, match="from: cannot be read" if "read" in call else "to: cannot be written"):
            storage.copy_file(tmp_path / "from", tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["from"]


def test_a_copy_never_overwrites(tmp_path):
    (tmp_path / "from").write_bytes(b"new")
    (tmp_path / "to").write_bytes(b"mine")
    with pytest.raises(StorageError, match="File exists"):
        storage.copy_file(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == b"mine"


def test_a_full_disk_is_told_while_writing():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        storage.append_scratch(storage.Path("/dev/full"), b"x")


def test_scratch_files_grow_at_the_end(tmp_path):
    storage.append_scratch(tmp_path / "s", b"ab")
    storage.append_scratch(tmp_path / "s", bytearray(b"cd"))
    assert (tmp_path / "s").read_bytes() == b"abcd"


# --- one of several -----------------------------------------------------------------------------------------------


def test_of_two_who_create_a_file_the_first_has_it(tmp_path):
    assert storage.create_exclusively(tmp_path / "lease", b"first")
    assert not storage.create_exclusively(tmp_path / "lease", b"second")
    assert (tmp_path / "lease").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["lease"]


def test_an_exclusive_file_has_its_content_durable_before_its_name(tmp_path):
    with storage.operations_replaced(Recorded()) as disk:
        storage.create_exclusively(tmp_path / "lease", b"1")
    folder = f"sync_directory {tmp_path.name}"
    assert disk.calls == ["create", "write 1", "fsync", "close", "link", folder, "unlink"]


def test_a_link_that_was_made_though_its_answer_got_lost_counts(tmp_path):
    class LostAnswer(FileOperations):
        def link(self, source, target):
            super().link(source, target)
            super().link(source, target)

    with storage.operations_replaced(LostAnswer()):
        assert storage.create_exclusively(tmp_path / "lease", b"1")


def test_a_file_system_without_links_is_a_storage_fault_that_leaves_nothing(tmp_path):
    with storage.operations_replaced(Failing("link", errno.EPERM)), pytest.raises(StorageError, match="lease: cannot"):
        storage.create_exclusively(tmp_path / "lease", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_removed_file_is_gone_and_a_missing_one_no_fault(tmp_path):
    (tmp_path / "x").write_text("")
    storage.remove_file(tmp_path / "x")
    storage.remove_file(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with storage.operations_replaced(Failing("unlink", errno.EACCES)), pytest.raises(StorageError):
        storage.remove_file(tmp_path / "x")


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


def test_a_folder_is_renamed_away_durably_before_its_files_go(tmp_path):
    folder = staged(tmp_path)
    with storage.operations_replaced(Recorded()) as disk:
        storage.remove_directory(folder)
    assert disk.calls == ["rename staging", f"sync_directory {tmp_path.name}", "unlink file", *["remove_directory"] * 2]


def test_a_removed_folder_leaves_nothing_and_a_missing_one_is_no_fault(tmp_path):
    storage.remove_directory(staged(tmp_path))
    storage.remove_directory(tmp_path / "staging")
    assert list(tmp_path.iterdir()) == []


def test_every_name_on_the_way_to_a_new_folder_is_durable(tmp_path):
    with storage.operations_replaced(Recorded()) as disk:
        storage.make_directory(tmp_path / "run" / "checkpoints")
        storage.make_directory(tmp_path / "run" / "checkpoints")
    assert disk.calls == [
        "make_directory run", f"sync_directory {tmp_path.name}", "make_directory checkpoints", "sync_directory run"
    ]  # fmt: skip


def test_a_folder_that_another_process_makes_meanwhile_is_no_fault(tmp_path):
    class Slow(FileOperations):
        def make_directory(self, path):
            path.mkdir()
            super().make_directory(path)

    with storage.operations_replaced(Slow()):
        storage.make_directory(tmp_path / "shared")
    assert (tmp_path / "shared").is_dir()


def test_a_published_folder_whose_name_is_not_durable_is_told_apart(tmp_path):
    class Half(FileOperations):
        def sync_directory(self, path):
            if path == tmp_path:
                raise OSError(errno.EIO, "Input/output error")
            super().sync_directory(path)

    staging = staged(tmp_path)
    with storage.operations_replaced(Half()), pytest.raises(storage.NotDurableError, match="final: is in place"):
        storage.publish_directory(staging, tmp_path / "final")
    assert (tmp_path / "final" / "sub" / "file").read_text() == "x"


def test_a_folder_is_moved_and_both_parents_know_it(tmp_path):
    folder = staged(tmp_path)
    (tmp_path / "other").mkdir()
    with storage.operations_replaced(Recorded()) as disk:
        storage.rename(folder, tmp_path / "other" / "here")
    assert disk.calls == ["rename staging", "sync_directory other", f"sync_directory {tmp_path.name}"]
    assert (tmp_path / "other" / "here" / "sub" / "file").exists()
    with pytest.raises(StorageError, match="there: cannot be written"):
        storage.rename(folder, tmp_path / "there")


def test_discarding_follows_no_link_and_goes_as_far_as_it_can(tmp_path):
    folder = staged(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("y")
    (folder / "way-out").symlink_to(tmp_path / "precious")
    with storage.operations_replaced(Failing("unlink", errno.EIO)):
        storage.discard_directory(folder)
    assert (folder / "sub" / "file").exists()
    storage.discard_directory(folder)
    storage.discard_directory(folder)
    assert not folder.exists()
    assert (tmp_path / "precious" / "file").read_text() == "y"


def test_a_folder_that_cannot_be_synced_is_a_storage_fault(tmp_path):
    with pytest.raises(StorageError, match="none: cannot be written"):
        storage.sync_directory(tmp_path / "none")


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
