"""A save is whole or not there, whatever fails and wherever it is killed."""

from __future__ import annotations

import errno
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dstrain.base.errors import CheckpointError
from dstrain.base.file_operations import FileOperations, operations_replaced
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from tests.support.tiny_checkpoints import content, fragments_of, holds_step, manifest_of, save, state_of, writer_of


def stored(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {(n, s): t.reshape(-1) for s in checkpoint.manifest.states for n, t in checkpoint.tensors(s).items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".hidden").write_text("not copied")
    return folder


def test_a_checkpoint_is_json_safetensors_yaml_and_the_tokenizer_and_nothing_else(
    tmp_path: Path, tokenizer: Path
) -> None:
    folder = save(tmp_path / "c", 3, tokenizer=tokenizer)
    assert folder == tmp_path / "c" / "step-00000003"
    assert sorted(content(tmp_path / "c")) == [
        f"step-00000003/{name}"
        for name in ("config.yaml", "manifest.json", "rank-00000-of-00001.safetensors", "tokenizer/tokenizer.json")
    ]
    assert (folder / "config.yaml").read_text() == "seed: 7\n"


def test_no_file_of_a_checkpoint_holds_a_pickle(tmp_path: Path, tokenizer: Path) -> None:
    for name, data in content(save(tmp_path, 3, tokenizer=tokenizer)).items():
        assert not data.startswith((b"\x80", b"PK")), name
        assert Path(name).suffix in {".json", ".safetensors", ".yaml"}


def test_fragments_are_stored_under_their_parameter_state_and_offset(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    with safe_open(str(folder / "rank-00000-of-00001.safetensors"), framework="pt") as file:
        assert "encoder.weight|exp_avg|7" in file.keys()
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())


def test_fragments_that_leave_a_gap_are_refused_and_nothing_is_published(tmp_path: Path) -> None:
    short = [f for f in fragments_of(state_of(1)) if (f.name, f.offset) != ("encoder.bias", 0)]
    with pytest.raises(CheckpointError, match=r"encoder\.bias fp32: elements 0 to 2 are not stored once"):
        writer_of(tmp_path).save(short, manifest_of(1), config_yaml="", tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_of_the_same_step_is_moved_aside_not_destroyed(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "manifest.json").write_text("garbage")
    before = content(folder)
    assert save(tmp_path, 5) == folder
    assert holds_step(stored(folder), 5)
    aside = [p for p in tmp_path.iterdir() if p.name.startswith("damaged-step-00000005-")]
    assert len(aside) == 1
    assert content(aside[0]) == before


def test_leftovers_of_killed_saves_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 5)
    before = content(tmp_path)
    for name in (".staging-00000007-ab", ".deleting-step-00000001-cd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    writer_of(tmp_path).remove_leftovers()
    assert content(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


# --- failing storage -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What SIGKILL looks like from inside: no handler runs."""


class Faulty(FileOperations):
    """One kind of operation fails at its n-th call: before it did its work, or after (a write: after half of it)."""

    def __init__(self, kind: str, *, at: int, fault: BaseException, after: bool = False) -> None:
        self.kind, self.at, self.fault, self.after, self.calls = kind, at, fault, after, 0
        setattr(self, kind, functools.partial(self._do, getattr(FileOperations, kind)))

    def _do(self, real: Callable[..., Any], *args: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return real(self, *args)
        if self.after:
            real(self, *(a[: len(a) // 2] if isinstance(a, memoryview) else a for a in args))
        raise self.fault


KINDS = (
    "create",
    "write",
    "fsync",
    "rename",
    "make_directory",
    "sync_directory",
    "unlink",
    "remove_directory",
    "close",
)
FAULTS = {"full": OSError(errno.ENOSPC, "full"), "failing": OSError(errno.EIO, "failing"), "killed": Killed()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_fails_or_is_killed_at_any_call_leaves_the_older_checkpoints_as_they_were(
    tmp_path: Path, tokenizer: Path, kind: str, fault: str, after: bool
) -> None:
    """For every n: the n-th call of an operation fails, before or after it did its work."""
    older = tmp_path / "older"
    save(older, 7)
    save(older, 8)
    for at in range(1, 100):
        folder = tmp_path / f"at-{at}"
        shutil.copytree(older, folder)
        before = content(folder / "step-00000008")
        faulty = Faulty(kind, at=at, fault=FAULTS[fault], after=after)
        succeeded = True
        with operations_replaced(faulty):
            try:
                save(folder, 9, keep_last=2, tokenizer=tokenizer)
            except (CheckpointError, Killed):
                succeeded = False
        found = newest_valid(folder)
        assert found.checkpoint is not None
        assert found.damaged == (), "what has a checkpoint's name must be whole"
        assert found.checkpoint.manifest.step == 9 if succeeded else found.checkpoint.manifest.step in (8, 9)
        assert holds_step(stored(found.checkpoint.folder), found.checkpoint.manifest.step)
        assert content(folder / "step-00000008") == before
        if fault != "killed":
            assert not list(folder.glob(".staging-*")), "a failed save removes what it wrote"
        writer_of(folder).remove_leftovers()
        assert all(p.name.startswith("step-") for p in folder.iterdir())
        save(folder, 10, keep_last=2)
        assert newest_valid(folder).checkpoint is not None
        assert holds_step(stored(folder / "step-00000010"), 10), "the next save works again"
        if faulty.calls < at:
            assert succeeded
            assert at > 1, "the fault was never injected"
            return
    raise AssertionError("a save made more calls than were tried")


def test_a_failed_save_says_which_step_and_why(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with operations_replaced(Faulty("fsync", at=1, fault=FAULTS["full"])):
        with pytest.raises(CheckpointError, match=r"checkpoint of step 2 was not saved: rank 0: .*the disk is full"):
            save(tmp_path, 2)


def test_a_folder_that_cannot_be_made_fails_the_save_not_the_process(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="no staging folder could be made for step 2"):
        save(tmp_path / "c", 2)


def test_a_failed_removal_of_an_old_checkpoint_does_not_fail_the_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    class Stuck(FileOperations):
        def rename(self, source: Path, target: Path) -> None:
            if target.name.startswith(".deleting-step"):
                raise OSError(errno.EIO, "failing")
            super().rename(source, target)

    with operations_replaced(Stuck()):
        assert save(tmp_path, 3, keep_last=2).name == "step-00000003"
    assert (tmp_path / "step-00000001").is_dir()


def test_a_full_disk_is_given_what_retention_allows_and_the_save_tried_once_more(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with operations_replaced(Faulty("write", at=1, fault=FAULTS["full"])) as faulty:
        save(tmp_path, 3, keep_last=2)
    assert faulty.calls > 1  # type: ignore[attr-defined]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert holds_step(stored(tmp_path / "step-00000003"), 3)


def test_a_full_disk_never_costs_the_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = content(tmp_path)
    with operations_replaced(Faulty("write", at=1, fault=FAULTS["full"])):
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(tmp_path, 2, keep_last=1)
    assert content(tmp_path) == before


def test_a_disk_that_gives_back_other_bytes_fails_the_save(tmp_path: Path) -> None:
    class Lying(FileOperations):
        def write(self, handle: int, data: memoryview) -> int:
            return super().write(handle, memoryview(bytes(data).replace(b"seed: 7", b"seed: 8")))

    save(tmp_path, 1)
    with operations_replaced(Lying()):
        with pytest.raises(CheckpointError, match=r"config\.yaml: the disk gives back other bytes"):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
