import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from dstrain.base.errors import RunInUseError, StorageError
from dstrain.health import lease as lease_module
from dstrain.health.lease import FILE_NAME, RunLease

HOLDER = """
import sys, time
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


def owner(folder):
    return json.loads((folder / FILE_NAME).read_text())


def plant(folder, **changes):
    """A lease of another host, alive a moment ago unless changed."""
    fields = {
        "host": "elsewhere", "pid": 1234, "process_started": 0.0, "job": "", "nonce": "n", "heartbeat": time.time(),
    } | changes  # fmt: skip
    (folder / FILE_NAME).write_text(json.dumps(fields))


def leases(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(RunInUseError) as caught:
        RunLease(tmp_path).__enter__()
    message = str(caught.value)
    assert f"{tmp_path}: in use by process {holder.pid} on {socket.gethostname()}, job 4711" in message
    assert re.search(r"\(heartbeat \d+ s ago\)", message)
    assert "set another run_folder" in message
    assert owner(tmp_path)["pid"] == holder.pid
    assert leases(tmp_path) == [FILE_NAME]


def test_the_folder_is_free_when_the_holder_leaves(tmp_path, holder):
    holder.communicate("go\n", timeout=30)
    assert leases(tmp_path) == []
    with RunLease(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_killed_holder_is_followed_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert owner(tmp_path)["pid"] == holder.pid
    with RunLease(tmp_path) as mine:
        assert owner(tmp_path)["pid"] == os.getpid()
        mine.check()
    assert leases(tmp_path) == []


def test_a_zombie_holds_nothing(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has collected it
    with RunLease(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_process_number_used_again_is_not_the_old_owner(tmp_path):
    plant(tmp_path, host=socket.gethostname(), pid=os.getpid(), process_started=1.0)
    with RunLease(tmp_path) as mine:
        mine.check()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with RunLease(tmp_path), pytest.raises(RunInUseError, match=f"process {os.getpid()}"):
        RunLease(tmp_path).__enter__()
    assert leases(tmp_path) == []


def test_another_host_is_believed_while_its_heart_beats(tmp_path):
    plant(tmp_path, heartbeat=time.time() - lease_module.SILENT_AFTER_S / 2)
    with pytest.raises(RunInUseError, match="process 1234 on elsewhere"):
        RunLease(tmp_path).__enter__()
    plant(tmp_path, heartbeat=time.time() - lease_module.SILENT_AFTER_S - 5)
    with RunLease(tmp_path):
        assert owner(tmp_path)["host"] == socket.gethostname()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"heartbeat": "soon"}', '{"pid": null}'])
def test_a_lease_that_cannot_be_read_holds_nothing(content, tmp_path):
    (tmp_path / FILE_NAME).write_text(content)
    with RunLease(tmp_path) as mine:
        mine.check()
    assert leases(tmp_path) == []


def test_who_was_taken_over_notices_and_does_not_remove_the_new_owners_lease(tmp_path):
    with RunLease(tmp_path) as mine:
        mine.check()
        plant(tmp_path, pid=99)
        with pytest.raises(RunInUseError, match="taken over by process 99 on elsewhere"):
            mine.check()
    assert owner(tmp_path)["pid"] == 99


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with RunLease(tmp_path):
        first = owner(tmp_path)["heartbeat"]
        deadline = time.monotonic() + 30
        while owner(tmp_path)["heartbeat"] == first and time.monotonic() < deadline:
            time.sleep(0.005)
        assert owner(tmp_path)["heartbeat"] > first
        assert owner(tmp_path)["pid"] == os.getpid()
    assert leases(tmp_path) == []


def test_the_heart_does_not_beat_over_an_owner_that_took_the_folder(tmp_path):
    class ThreeBeats:
        left = 3

        def wait(self, _seconds):
            self.left -= 1
            return self.left < 0

    gone = RunLease(tmp_path)
    gone._stop = ThreeBeats()
    plant(tmp_path, pid=99)
    gone._beat()
    assert gone._stop.left < 0
    assert owner(tmp_path)["pid"] == 99


def test_the_lease_goes_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLease(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    assert leases(tmp_path / "new" / "run") == []


def test_a_folder_that_cannot_be_written_is_a_storage_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        RunLease(tmp_path / "file").__enter__()
