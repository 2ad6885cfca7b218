import json
import threading

import pytest

from dstrain.base.errors import StorageError
from dstrain.base.world import World
from dstrain.health.incidents import HealthFolder, job_name

ALARM = {"kind": "hung", "rank": 1, "host": "a"}


def test_facts_of_this_job_only(tmp_path):
    mine, other = HealthFolder(tmp_path, job="a"), HealthFolder(tmp_path, job="b")
    mine.publish(3, {"step": 7})
    assert mine.facts(3) == {"step": 7, "rank": 3, "job": "a"}
    assert other.facts(3) is None
    assert mine.facts(2) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"job": 1}'])
def test_files_that_cannot_be_read_say_nothing(tmp_path, content):
    folder = HealthFolder(tmp_path, job="a")
    for name in ("rank-00000.json", "incident-0001-alarm.json", "incident-0001-report.json"):
        (folder.folder / name).write_text(content)
    assert folder.facts(0) is None
    assert folder.alarm() is None


def test_the_first_alarm_is_everybodys(tmp_path):
    first, second = HealthFolder(tmp_path, job="a"), HealthFolder(tmp_path, job="a")
    assert first.alarm() is None
    raised = first.raise_alarm(ALARM)
    assert raised == {**ALARM, "job": "a", "number": 1}
    assert second.raise_alarm({"kind": "died", "rank": 0}) == raised
    assert second.alarm() == raised


def test_of_many_who_raise_it_at_once_one_does(tmp_path):
    folders = [HealthFolder(tmp_path, job="a") for _ in range(8)]
    start = threading.Barrier(8)
    raised = []

    def run(rank):
        start.wait()
        raised.append(folders[rank].raise_alarm({"kind": "hung", "rank": rank}))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({json.dumps(r, sort_keys=True) for r in raised}) == 1
    assert len(list((tmp_path / "health").glob("incident-*-alarm.json"))) == 1


def test_an_alarm_of_before_the_start_is_history(tmp_path):
    HealthFolder(tmp_path, job="a").raise_alarm(ALARM)
    again = HealthFolder(tmp_path, job="a")
    assert again.first == 2
    assert again.alarm() is None
    assert again.raise_alarm(ALARM)["number"] == 2
    assert HealthFolder(tmp_path, job="a", first=1).alarm()["number"] == 1


def test_another_jobs_alarm_is_not_ours(tmp_path):
    mine, other = HealthFolder(tmp_path, job="a"), HealthFolder(tmp_path, job="b")
    other.raise_alarm(ALARM)
    assert mine.alarm() is None
    assert mine.raise_alarm({"kind": "died"})["number"] == 2
    assert mine.alarm() == {"kind": "died", "job": "a", "number": 2}
    assert other.alarm()["number"] == 1


def test_who_started_late_is_still_heard(tmp_path):
    early = HealthFolder(tmp_path, job="a")
    HealthFolder(tmp_path, job="b").raise_alarm(ALARM)
    late = HealthFolder(tmp_path, job="a")
    assert late.first == 2
    late.raise_alarm(ALARM)
    assert early.alarm()["number"] == 2


def test_the_first_report_is_everybodys_and_a_copy_has_a_fixed_name(tmp_path):
    folder = HealthFolder(tmp_path, job="a")
    assert folder.report(1) is None
    assert folder.publish_report(1, {"line": "first"}) == ({"line": "first"}, True)
    assert folder.publish_report(1, {"line": "second"}) == ({"line": "first"}, False)
    assert folder.report(1) == {"line": "first"}
    copy = folder.folder / "hang-report.json"
    assert json.loads(copy.read_text()) == {"line": "first"}
    folder.publish_report(2, {"line": "later"})
    assert json.loads(copy.read_text()) == {"line": "later"}
    assert folder.report(1) == {"line": "first"}


def test_stacks_of_two_incidents_do_not_mix(tmp_path):
    before = HealthFolder(tmp_path, job="a")
    path = before.stacks_path(3)
    assert path.name == "0001-rank-00003.txt"
    assert path.parent.is_dir()
    before.raise_alarm(ALARM)
    assert HealthFolder(tmp_path, job="a").stacks_path(3).name == "0002-rank-00003.txt"


def test_a_run_folder_that_cannot_be_written_is_a_storage_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        HealthFolder(tmp_path / "file", job="a")


def test_all_ranks_of_a_start_have_one_job_name_and_other_starts_another():
    def worlds(**fields):
        return [World(rank=r, size=4, local_size=2, master_addr="n1", **fields) for r in range(4)]

    environment = {"SLURM_JOB_ID": "7", "RANK": "differs"}
    names = {job_name(w, {**environment, "RANK": str(w.rank)}) for w in worlds(master_port=1)}
    assert len(names) == 1
    assert names != {job_name(worlds(master_port=2)[0], environment)}
    assert names != {job_name(worlds(master_port=1)[0], {**environment, "SLURM_RESTART_COUNT": "1"})}
    assert names != {job_name(worlds(master_port=1)[0], {**environment, "DSTRAIN_ATTEMPT": "2"})}


def test_jobs_of_one_host_on_two_hosts_differ(monkeypatch):
    world = World(size=2, local_size=2)
    here = job_name(world, {})
    monkeypatch.setattr("dstrain.health.incidents.socket.gethostname", lambda: "elsewhere")
    assert job_name(world, {}) != here
