"""A save's thread ends with an outcome, whatever happens to it, and a hanging one is told from a working one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import ExitCode
from dstrain.base.file_operations import FileOperations, operations_replaced
from dstrain.checkpoint.background import PublishingThread, SavePlan, SaveThread
from dstrain.checkpoint.layout import reports_folder, staging_folder
from dstrain.checkpoint.outcome import Published
from dstrain.checkpoint.publish import Contents
from dstrain.checkpoint.reports import ask_again, read_report
from dstrain.checkpoint.retention import Kept, Retention
from dstrain.checkpoint.snapshot import Snapshot
from tests.support.tiny_checkpoints import fragments_of, manifest_of, state_of


def plan_of(folder: Path, *, rank: int = 0, world_size: int = 1, **fields: Any) -> SavePlan:
    staging = staging_folder(folder, 4, "ab")
    for path in (staging, reports_folder(staging)):
        path.mkdir(parents=True, exist_ok=True)
    standard = {
        "verify": True,
        "timeout_s": 30.0,
        "contents": Contents(manifest_of(4), "", None),
        "protect": frozenset(),
    }
    return SavePlan(4, "ab", staging, folder, rank, world_size, **{**standard, **fields})


def snapshot() -> Snapshot:
    taken = Snapshot()
    taken.take(fragments_of(state_of(4)))
    return taken


def publishing(plan: SavePlan, *, told: list[Published] | None = None, fault: str = "") -> PublishingThread:
    return PublishingThread(
        plan, snapshot(), retention=Retention(plan.folder, kept=Kept(1)), check_owner=lambda: None,
        on_published=(told if told is not None else []).append, fault=fault,
    )  # fmt: skip


class Held(FileOperations):
    """A write that never comes back by itself."""

    def __init__(self) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()

    def write(self, handle: int, data: memoryview) -> int:
        self.reached.set()
        self.let_go.wait()
        return super().write(handle, data)


def test_a_world_of_one_is_published_by_its_thread(tmp_path: Path) -> None:
    told: list[Published] = []
    thread = publishing(plan_of(tmp_path), told=told)
    thread.start()
    assert thread.wait(30)
    assert thread.outcome is not None
    published = thread.outcome.published
    assert published is not None
    assert told == [published]
    assert published.folder == tmp_path / "step-00000004"
    assert published.size_bytes == sum(
        p.stat().st_size for p in published.folder.iterdir() if p.name != "manifest.json"
    )
    assert set(published.seconds) == {"copy", "write", "publish", "total"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_callback_that_fails_does_not_unmake_the_checkpoint(tmp_path: Path) -> None:
    def broken(_: Published) -> None:
        raise ValueError("a defect elsewhere")

    thread = PublishingThread(
        plan_of(tmp_path), snapshot(), retention=Retention(tmp_path, kept=Kept(1)), check_owner=lambda: None,
        on_published=broken,
    )  # fmt: skip
    thread.start()
    assert thread.wait(30)
    assert thread.outcome is not None
    assert thread.outcome.published is not None


def test_a_defect_ends_the_save_not_the_process(tmp_path: Path) -> None:
    thread = publishing(plan_of(tmp_path, contents=Contents({"step": 4, "unserialisable": object()}, "", None)))
    thread.start()
    assert thread.wait(30)
    assert thread.outcome is not None
    assert thread.outcome.failed
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_take_part_says_so(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, rank=1, world_size=2)
    thread = SaveThread(plan, snapshot(), fault="no memory")
    thread.start()
    assert thread.wait(30)
    assert thread.outcome is not None
    assert thread.outcome.error == "checkpoint of step 4 was not saved: rank 1: no memory"
    report = read_report(plan.staging, "ab", 1, 1)
    assert report is not None
    assert report["error"] == "no memory"


def test_a_rank_without_room_waits_to_be_asked_again(tmp_path: Path) -> None:
    class FullOnce(FileOperations):
        tried = False

        def write(self, handle: int, data: memoryview) -> int:
            if not self.tried:
                self.tried = True
                raise OSError(28, "full")
            return super().write(handle, data)

    plan = plan_of(tmp_path, rank=1, world_size=2)
    thread = SaveThread(plan, snapshot())
    with operations_replaced(FullOnce()):
        thread.start()
        while read_report(plan.staging, "ab", 1, 1) is None:
            time.sleep(0.005)
        assert not thread.ended
        ask_again(plan.staging, "ab")
        assert thread.wait(30)
    assert thread.outcome is not None
    assert thread.outcome.own_part
    assert not thread.outcome.failed
    assert read_report(plan.staging, "ab", 1, 2) is not None


def test_ranks_that_do_not_report_are_named_when_the_time_is_over(tmp_path: Path) -> None:
    thread = publishing(plan_of(tmp_path, world_size=4, timeout_s=0.0))
    thread.start()
    assert thread.wait(30)
    assert thread.outcome is not None
    assert "ranks 1, 2, 3 did not report within 0 s" in thread.outcome.error
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_save_gives_the_reason(tmp_path: Path) -> None:
    thread = publishing(plan_of(tmp_path, world_size=2))
    thread.start()
    thread.cancel("rank 1: its disk died")
    thread.cancel("something later")
    assert thread.wait(30)
    assert thread.outcome is not None
    assert thread.outcome.error == "checkpoint of step 4 was not saved: rank 1: its disk died"
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_thread_is_late_after_its_time_and_a_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaveThread, "grace_s", 0.0)
    with operations_replaced(Held()) as held:
        thread = publishing(plan_of(tmp_path, timeout_s=3600.0))
        thread.start()
        held.reached.wait()  # type: ignore[attr-defined]
        assert not thread.late
        assert not thread.wait(0.0)
        thread.cancel("the run ends")
        assert thread.late
        assert thread.holds_the_buffer
        held.let_go.set()  # type: ignore[attr-defined]
        assert thread.wait(30)
    assert not thread.late
    assert thread.outcome is not None
    assert thread.outcome.failed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_without_a_word_has_failed(tmp_path: Path) -> None:
    class Death(BaseException):
        pass

    class Killing(FileOperations):
        def fsync(self, handle: int) -> None:
            raise Death

    with operations_replaced(Killing()):
        thread = publishing(plan_of(tmp_path))
        thread.start()
        assert thread.wait(30)
    assert thread.outcome is not None
    assert "the writing thread died" in thread.outcome.error


def test_a_save_that_was_never_begun_has_an_end(tmp_path: Path) -> None:
    thread = publishing(plan_of(tmp_path))
    thread.fail("no folder")
    assert thread.wait(0.0)
    assert not thread.holds_the_buffer
    assert thread.outcome is not None
    assert (thread.outcome.error, thread.outcome.exit_code) == ("no folder", ExitCode.RETRY_HERE)
