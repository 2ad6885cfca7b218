import os
import stat

import pytest

from dstrain.base.errors import ConfigError
from dstrain.base.privacy import check_place, make_private


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_afterwards_is_the_owners_only(tmp_path):
    make_private(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "events.jsonl").write_text("")
    assert mode(tmp_path / "run") == 0o700
    assert mode(tmp_path / "run" / "checkpoints") == 0o700
    assert mode(tmp_path / "run" / "events.jsonl") == 0o600


def test_a_parent_that_everybody_may_write_is_refused_by_name(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for run in ("open/run", "open/not/yet/there"):
        with pytest.raises(ConfigError, match=r"every user of this machine may write into .*open \(mode 777\)"):
            check_place(tmp_path / run)


def test_a_run_folder_that_everybody_may_write_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(ConfigError, match="mode 777"):
        check_place(tmp_path / "run")


def test_a_sticky_place_such_as_tmp_is_fine(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    check_place(tmp_path / "tmp" / "run")


def test_a_group_may_share(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project").chmod(0o2775)
    check_place(tmp_path / "project" / "run")


def test_a_link_is_judged_by_where_it_leads(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "run").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "run").symlink_to(tmp_path / "open" / "run")
    with pytest.raises(ConfigError, match="may write into"):
        check_place(tmp_path / "run")


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_is_no_place_for_a_run(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_folder: .*file is a file: choose another folder"):
        check_place(tmp_path / name)


def test_a_place_that_may_not_be_written_to_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere but on a read-only disk
    with pytest.raises(ConfigError, match=rf"you may not write into {tmp_path}: choose another folder"):
        check_place(tmp_path / "run")
