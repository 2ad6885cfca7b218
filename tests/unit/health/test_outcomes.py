import json
import socket

from dstrain.base.errors import ExitCode
from dstrain.base.world import World
from dstrain.health.outcomes import write_exit


def test_each_rank_leaves_its_own_small_file(tmp_path):
    for rank in range(2):
        write_exit(tmp_path / "run", World(rank=rank, size=2), code=ExitCode.SAVED_REQUEUE, cause="SIGTERM", step=7)
    files = sorted((tmp_path / "run" / "exit").iterdir())
    assert [file.name for file in files] == ["rank-00000.json", "rank-00001.json"]
    found = json.loads(files[1].read_text())
    assert found.pop("time") > 1.6e9
    assert found == {
        "code": 75, "name": "saved_requeue", "cause": "SIGTERM", "step": 7, "rank": 1, "world_size": 2,
        "host": socket.gethostname(),
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
