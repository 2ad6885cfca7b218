from __future__ import annotations

import pytest

from dstrain.base.errors import DataError, RunInUseError
from dstrain.corpus.work_folder import WorkFolder, remove_quietly


@pytest.fixture
def work(tmp_path):
    work = WorkFolder.beside(tmp_path / "shards")
    work.create()
    return work


def test_it_lies_beside_the_output_and_says_what_it_is(work, tmp_path):
    assert work.path == tmp_path / ".work-shards"
    assert "can be deleted" in (work.path / "README").read_text()
    work.create()
    assert work.done() == set()


def test_a_finished_task_keeps_its_result(work):
    work.complete("map-1", {"data": "x", "n": 3})
    assert work.done() == {"map-1"}
    assert "map-1" in work
    assert "map-2" not in work
    assert work.result("map-1") == {"data": "x", "n": 3}
    with pytest.raises(DataError, match="no such file"):
        work.result("map-2")
    (work.path / "done" / "map-1.json").write_text("[]")
    with pytest.raises(DataError, match="not a task marker"):
        work.result("map-1")


def test_data_names_never_meet_and_stay_inside(work):
    assert work.new_data("map") != work.new_data("map")
    assert work.data("../../etc/passwd") == work.path / "data" / "passwd"


def test_sweeping_keeps_what_markers_name(work):
    for name in ("kept", "left"):
        (work.path / "data" / name).mkdir()
        (work.path / "data" / name / "file").write_text("x")
    (work.path / "data" / "cut").write_text("x")
    work.sweep(["kept"])  # what is young may be written by another job
    assert len(list((work.path / "data").iterdir())) == 3
    work.sweep(["kept"], older_than_s=-1)
    assert [path.name for path in (work.path / "data").iterdir()] == ["kept"]
    with work.claim("map-1"), pytest.raises(RunInUseError), work.claim("map-1"):
        pass
    work.remove()
    assert not work.path.exists()
    work.sweep([])
    remove_quietly(work.path)
