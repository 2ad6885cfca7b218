import json
import os
import re
import socket

import pytest

from dstrain.base.errors import ConfigError, ExitCode, PeerError, PeerGoneError, StorageError
from dstrain.base.world import World
from dstrain.health.outcomes import ADVICE, Ending, clear_exits, ending_of, write_exit


def left(folder, rank=0):
    return json.loads((folder / "exit" / f"rank-{rank:05d}.json").read_text())


def test_each_rank_leaves_its_own_small_file(tmp_path):
    for rank in range(2):
        write_exit(
            tmp_path / "run", World(rank=rank, size=2), code=ExitCode.SAVED_REQUEUE, cause="SIGTERM", step=7,
            signal="SIGTERM", phase="training", last_saved_step=7, attempt=3,
        )  # fmt: skip
    files = sorted((tmp_path / "run" / "exit").iterdir())
    assert [file.name for file in files] == ["rank-00000.json", "rank-00001.json"]
    found = left(tmp_path / "run", 1)
    assert found.pop("time") > 1.6e9
    assert found == {
        "code": 75, "name": "saved_requeue", "kind": "request", "cause": "SIGTERM", "signal": "SIGTERM", "phase": "training",
        "advice": "start the same command again to go on", "step": 7, "last_saved_step": 7, "attempt": 3, "rank": 1,
        "world_size": 2, "host": socket.gethostname(), "pid": os.getpid(),
    }  # fmt: skip


def test_the_last_end_wins(tmp_path):
    write_exit(tmp_path, World(), code=ExitCode.DEFECT, cause="x", step=None)
    write_exit(tmp_path, World(), code=ExitCode.COMPLETE, cause="done", step=9)
    [file] = (tmp_path / "exit").iterdir()
    assert json.loads(file.read_text())["code"] == 0


def test_a_run_folder_that_cannot_be_written_hides_no_other_fault(tmp_path):
    (tmp_path / "file").write_text("kept")
    write_exit(tmp_path / "file", World(), code=ExitCode.DEFECT, cause="x", step=None)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_new_attempt_clears_the_words_of_the_last_and_nothing_else(tmp_path):
    clear_exits(tmp_path)  # nothing there
    for rank in range(3):
        write_exit(tmp_path, World(rank=rank, size=3), code=ExitCode.COMPLETE, cause="done", step=9)
    (tmp_path / "exit" / "note").write_text("mine")
    clear_exits(tmp_path)
    assert [p.name for p in (tmp_path / "exit").iterdir()] == ["note"]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (PeerGoneError("another rank is gone"), Ending(ExitCode.RETRY_HERE, "peer", "another rank is gone")),
        (StorageError("the disk is full"), Ending(ExitCode.RETRY_HERE, "fault", "the disk is full")),
        (ConfigError("a:\n  b"), Ending(ExitCode.BAD_INPUT, "fault", "a: b")),
        (PeerError("rank 1: x", exit_code=77), Ending(ExitCode.UNHEALTHY_NODE, "peer", "rank 1: x")),
        (ValueError("3 is odd"), Ending(ExitCode.DEFECT, "defect", "ValueError: 3 is odd")),
        (AssertionError(), Ending(ExitCode.DEFECT, "defect", "AssertionError")),
        (KeyboardInterrupt(), Ending(ExitCode.DEFECT, "interrupt", "interrupted by a person, without a save")),
    ],
)
def test_an_exception_says_how_a_rank_ends(error, ending):
    assert ending_of(error) == ending


def test_an_exit_file_holds_no_secret_and_no_novel(tmp_path):
    error = OSError(
        "s3://user:hunter22secret@store/x?X-Amz-Signature=0123456789abcdef0123456789abcdef failed " + "z " * 999
    )
    ending = ending_of(error)
    write_exit(tmp_path, World(), code=ending.code, kind=ending.kind, cause=str(error), step=1)
    for text in (ending.cause, left(tmp_path)["cause"]):
        assert "hunter22secret" not in text
        assert "0123456789abcdef" not in text
        assert len(text) <= 520
    assert left(tmp_path)["kind"] == "defect"


def test_every_code_has_an_advice_and_the_usual_kind(tmp_path):
    assert set(ADVICE) == set(ExitCode)
    kinds = {}
    for code in ExitCode:
        write_exit(tmp_path, World(), code=code, cause="x", step=None)
        kinds[int(code)] = left(tmp_path)["kind"]
    assert kinds[0] == "complete"
    assert (kinds[1], kinds[75], kinds[82]) == ("defect", "request", "request")
    assert {kinds[n] for n in (2, 76, 77, 78, 79, 80, 81)} == {"fault"}


def test_the_page_names_every_key_of_the_file(tmp_path, repository):
    write_exit(tmp_path, World(), code=ExitCode.COMPLETE, cause="x", step=None)
    page = (repository / "docs/exit-codes.md").read_text(encoding="utf-8")
    table = page.partition("| key | content |")[2].partition("\n\n")[0]
    named = {key for keys in re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE) for key in keys.split(", ")}
    assert named == set(left(tmp_path))
