import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from dstrain.base.errors import RunInUseError, StorageError
from dstrain.health import lease as lease_module
from dstrain.health.lease import FILE_NAME, RunLease
from dstrain.health.watched_process import identify

HOLDER = """
import sys
from pathlib import Path
from dstrain.health.lease import RunLease
with RunLease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SLURM_JOB_ID": "4711"},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture
def impatient_watch(monkeypatch):
    """Silence is a matter of a moment."""
    monkeypatch.setattr(lease_module, "SILENT_AFTER_S", 0.05)
    monkeypatch.setattr(lease_module, "LOOK_EVERY_S", 0.01)


def files(folder):
    return sorted(p.name for p in (folder / FILE_NAME).iterdir())


def owner(folder):
    return json.loads((folder / FILE_NAME / max(n for n in files(folder) if n.endswith(".json"))).read_text())


def plant(folder, *, epoch=3, beat=None, **changes):
    """A lease of another machine."""
    fields = {
        "host": "elsewhere", "machine": "m", "pid": 1234, "process_started": 0, "job": "", "epoch": epoch, "released": False,
    } | changes  # fmt: skip
    (folder / FILE_NAME).mkdir(exist_ok=True)
    (folder / FILE_NAME / f"{epoch:08d}.json").write_text(json.dumps(fields))
    if beat is not None:
        (folder / FILE_NAME / f"{epoch:08d}.beat").write_text(json.dumps({"beats": 1, "time": beat}))


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(RunInUseError) as caught:
        RunLease(tmp_path).__enter__()
    message = str(caught.value)
    assert f"{tmp_path}: in use by process {holder.pid} on {socket.gethostname()}, job 4711" in message
    assert re.search(r"\(heartbeat \d s ago\)", message)
    assert "set another run_folder" in message
    assert owner(tmp_path)["pid"] == holder.pid
    assert files(tmp_path) == ["00000001.beat", "00000001.json"]


def test_the_folder_is_free_when_the_holder_leaves_and_the_count_goes_on(tmp_path, holder):
    holder.communicate("go\n", timeout=30)
    assert files(tmp_path) == ["00000001.json"]
    assert owner(tmp_path)["released"]
    with RunLease(tmp_path) as mine:
        assert owner(tmp_path)["pid"] == os.getpid()
        assert mine.epoch == 2
        assert files(tmp_path) == ["00000002.beat", "00000002.json"]
    with RunLease(tmp_path) as mine:
        assert mine.epoch == 3
    assert files(tmp_path) == ["00000003.json"]


def test_a_killed_holder_is_followed_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert owner(tmp_path)["pid"] == holder.pid
    with RunLease(tmp_path) as mine:
        assert owner(tmp_path)["pid"] == os.getpid()
        assert mine.epoch == 2
        mine.check()


def test_a_zombie_holds_nothing(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has collected it
    with RunLease(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_process_number_used_again_is_not_the_old_owner(tmp_path):
    started = identify(os.getpid()).started
    plant(tmp_path, machine=lease_module.this_machine(), pid=os.getpid(), process_started=started - 1)
    with RunLease(tmp_path) as mine:
        mine.check()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with RunLease(tmp_path) as mine:
        with pytest.raises(RunInUseError, match=f"process {os.getpid()}"):
            RunLease(tmp_path).__enter__()
        mine.check()
        assert files(tmp_path) == ["00000001.beat", "00000001.json"]


def test_a_requeued_slurm_job_follows_its_own_earlier_start_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "lab")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    plant(tmp_path, beat=time.time(), cluster="lab", job="4711", restart=1)
    with RunLease(tmp_path, patient=True) as mine:
        assert mine.epoch == 4
        assert [owner(tmp_path)[name] for name in ("cluster", "job", "restart")] == ["lab", "4711", 2]


@pytest.mark.parametrize(
    "other", [{"restart": 2}, {"restart": 3}, {"job": "4712"}, {"cluster": "else"}, {"job": ""}], ids=str
)
def test_any_other_job_and_a_later_start_of_the_same_are_left_alone(tmp_path, monkeypatch, other):
    for name, value in {"CLUSTER_NAME": "lab", "JOB_ID": "4711", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    plant(tmp_path, beat=time.time(), **{"cluster": "lab", "job": "4711", "restart": 1, **other})
    with pytest.raises(RunInUseError, match="in use by process 1234"):
        RunLease(tmp_path).__enter__()


def test_outside_of_slurm_no_start_is_a_later_one(tmp_path, monkeypatch):
    for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    plant(tmp_path, beat=time.time(), cluster="", job="", restart=-1)
    with pytest.raises(RunInUseError):
        RunLease(tmp_path).__enter__()


def test_another_machine_with_a_recent_heartbeat_is_left_alone_without_a_wait(tmp_path):
    plant(tmp_path, beat=time.time() - lease_module.SILENT_AFTER_S / 2)
    with pytest.raises(RunInUseError, match="process 1234 on elsewhere"):
        RunLease(tmp_path).__enter__()


@pytest.mark.parametrize("years", [-10, -1e-6, 10])
@pytest.mark.parametrize("patient", [False, True])
def test_no_clock_decides_that_another_machine_is_dead_only_silence_does(tmp_path, monkeypatch, years, patient):
    """The owner's clock is wrong by years; it beats, then it stops."""
    beats, looks = [], []
    plant(tmp_path, beat=time.time() + years * 365 * 86400)

    def look(self, seconds):
        looks.append(seconds)
        if not beats:  # one heartbeat while we watch
            beats.append(1)
            plant(tmp_path, beat=time.time() + years * 365 * 86400 + 10)

    monkeypatch.setattr(lease_module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(threading.Event, "wait", look)
    with pytest.raises(RunInUseError, match="process 1234 on elsewhere"):
        RunLease(tmp_path, patient=patient).__enter__()
    monkeypatch.undo()
    fresh = not patient and abs(years) < 1
    assert len(looks) == (0 if fresh else 1)

    monkeypatch.setattr(lease_module, "SILENT_AFTER_S", 0.02)
    monkeypatch.setattr(lease_module, "LOOK_EVERY_S", 0.01)
    with RunLease(tmp_path, patient=True) as mine:
        assert (owner(tmp_path)["pid"], mine.epoch) == (os.getpid(), 4)


def test_an_owner_elsewhere_that_leaves_while_we_watch_is_followed_at_once(tmp_path, monkeypatch):
    plant(tmp_path)

    def leave(self, seconds):
        plant(tmp_path, released=True)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", leave)
        lease = RunLease(tmp_path, patient=True)
        lease._require_free(3)


def test_a_container_with_the_same_host_name_is_another_machine(tmp_path):
    """Its process number means nothing here, so only its heart can say that it is alive."""
    plant(tmp_path, host=socket.gethostname(), pid=2**30, beat=time.time())
    with pytest.raises(RunInUseError, match="in use by process 1073741824"):
        RunLease(tmp_path).__enter__()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"process_started": "soon"}', '{"pid": null}'])
def test_a_lease_that_cannot_be_one_of_ours_holds_nothing(content, tmp_path, impatient_watch):
    (tmp_path / FILE_NAME).mkdir()
    (tmp_path / FILE_NAME / "00000005.json").write_text(content)
    with RunLease(tmp_path) as mine:
        mine.check()
        assert mine.epoch == 6


def test_a_lease_file_that_cannot_be_read_is_not_taken_for_a_dead_one(tmp_path):
    (tmp_path / FILE_NAME / "00000005.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"00000005\.json: cannot be read"):
        RunLease(tmp_path).__enter__()


def test_who_was_taken_over_notices_and_leaves_the_new_owners_lease_alone(tmp_path):
    with RunLease(tmp_path) as mine:
        mine.check()
        plant(tmp_path, epoch=2, pid=99)
        with pytest.raises(RunInUseError, match=r"taken over by process 99 on elsewhere \(epoch 2, this job had 1\)"):
            mine.check()
        mine._beat_once()
    assert (owner(tmp_path)["pid"], owner(tmp_path)["released"]) == (99, False)


def test_a_removed_lease_may_mean_another_owner(tmp_path):
    with RunLease(tmp_path) as mine:
        shutil.rmtree(tmp_path / FILE_NAME)
        with pytest.raises(RunInUseError, match=r"00000001\.json was removed from lease/"):
            mine.check()
    assert not (tmp_path / FILE_NAME).exists()  # leaving does not bring it back


def test_a_full_disk_does_not_end_a_job_that_asks_whether_it_owns_the_folder(tmp_path, monkeypatch):
    def full(path, data):
        raise StorageError("the disk is full")

    with RunLease(tmp_path) as mine:
        monkeypatch.setattr(lease_module, "write_bytes", full)
        mine.check()
        monkeypatch.undo()


def test_an_old_view_of_the_folder_yields_to_epochs_that_are_ahead(tmp_path, monkeypatch):
    """A client whose cache still shows epoch 2, released and swept long ago, makes epoch 3 where 9 is alive."""
    started = identify(os.getpid()).started
    plant(tmp_path, epoch=9, machine=lease_module.this_machine(), pid=os.getpid(), process_started=started)
    true_view, stale = RunLease._newest, [2]

    def newest(self):
        return stale.pop() if stale else true_view(self)

    monkeypatch.setattr(RunLease, "_newest", newest)
    with pytest.raises(RunInUseError, match=f"in use by process {os.getpid()}"):
        RunLease(tmp_path).__enter__()
    assert files(tmp_path) == ["00000009.json"]


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with RunLease(tmp_path):
        path = tmp_path / FILE_NAME / "00000001.beat"
        deadline = time.monotonic() + 30
        while json.loads(path.read_text())["beats"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert owner(tmp_path)["pid"] == os.getpid()


def test_the_lease_goes_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLease(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    assert owner(tmp_path / "new" / "run")["released"]


def test_a_folder_that_cannot_be_written_is_a_storage_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        RunLease(tmp_path / "file").__enter__()


def test_a_lease_without_a_heartbeat_is_not_kept(tmp_path, monkeypatch):
    def full(path, data):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(lease_module, "write_bytes", full)
        with pytest.raises(StorageError, match="disk is full"):
            RunLease(tmp_path).__enter__()
    with RunLease(tmp_path) as mine:
        assert mine.epoch == 1
