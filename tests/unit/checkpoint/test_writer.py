"""A save is whole or not there, whatever fails and wherever it is killed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dstrain.base import storage
from dstrain.base.errors import CheckpointError
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
    with pytest.raises(CheckpointError):
        Checkpoint(writer_of(tmp_path).save(short, manifest_of(1), config_yaml="", tokenizer=None))
    assert newest_valid(tmp_path).checkpoint is None


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


class Fault:
    """Stands for one storage primitive and fails at its n-th call, before or after the call did `partly`."""

    def __init__(
        self, real: Callable[..., Any], *, at: int, fault: BaseException, partly: Callable[..., Any] | None = None
    ) -> None:
        self.real, self.at, self.fault, self.partly, self.calls = real, at, fault, partly, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return self.real(*args, **kwargs)
        if self.partly is not None:
            self.partly(*args, **kwargs)
        raise self.fault


def half_written(path: Path, data: bytes | memoryview) -> None:
    path.write_bytes(bytes(data)[: len(data) // 2])


PRIMITIVES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "fsync": (os, "fsync", os.fsync),
    "replace": (os, "replace", os.replace),
    "rename": (os, "rename", os.rename),
    "mkdir": (os, "mkdir", os.mkdir),
    "write": (storage, "_write_and_sync", half_written),
}
FAULTS = {"full": OSError(errno.ENOSPC, "full"), "failing": OSError(errno.EIO, "failing"), "killed": Killed()}


def interrupted(
    folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, *, primitive: str, at: int, fault: str, after: bool
) -> tuple[bool, bool]:
    """Save step 9 with one call failing; whether the call was reached, and whether the save said it succeeded."""
    owner, name, partly = PRIMITIVES[primitive]
    injected = Fault(getattr(owner, name), at=at, fault=FAULTS[fault], partly=partly if after else None)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, injected)
        try:
            save(folder, 9, keep_last=2, tokenizer=tokenizer)
        except (CheckpointError, Killed):
            return injected.calls >= at, False
    return injected.calls >= at, True


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("primitive", list(PRIMITIVES))
def test_a_save_that_fails_or_is_killed_at_any_call_leaves_the_older_checkpoints_as_they_were(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, primitive: str, fault: str, after: bool
) -> None:
    """For every n: the n-th call of a storage primitive fails, before or after it did its work (a write: half of it)."""
    older = tmp_path / "older"
    save(older, 7)
    save(older, 8)
    for at in range(1, 100):
        folder = tmp_path / f"at-{at}"
        shutil.copytree(older, folder)
        before = content(folder / "step-00000008")
        reached, succeeded = interrupted(
            folder, tokenizer, monkeypatch, primitive=primitive, at=at, fault=fault, after=after
        )
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
        if not reached:
            assert succeeded
            assert at > 1, "the fault was never injected"
            return
    raise AssertionError("a save made more calls than were tried")


def test_a_failed_save_says_which_step_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", Fault(os.fsync, at=1, fault=FAULTS["full"]))
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 was not saved: rank 0: .*the disk is full"):
        save(tmp_path, 2)


def test_a_folder_that_cannot_be_made_fails_the_save_not_the_process(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="no staging folder could be made for step 2"):
        save(tmp_path / "c", 2)


def test_a_failed_removal_of_an_old_checkpoint_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    monkeypatch.setattr(os, "rename", Fault(os.rename, at=2, fault=FAULTS["failing"]))
    assert save(tmp_path, 3, keep_last=2).name == "step-00000003"
    assert (tmp_path / "step-00000001").is_dir()
