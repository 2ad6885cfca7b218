import faulthandler
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dstrain.base.errors import StorageError
from dstrain.base.world import World
from dstrain.health import heartbeat as heartbeat_module
from dstrain.health.heartbeat import Phase
from dstrain.health.sidecar_settings import STACKS_SIGNAL
from dstrain.health.watchdog import SIDECARS_AT_MOST, Watchdog, WatchdogConfig
from dstrain.health.watched_process import identify


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_allowances_are_the_settings_of_the_same_names():
    config = WatchdogConfig(data_s=7.0, factor=3.0)
    assert (config.budgets().data_s, config.budgets().factor, config.budgets().save_s) == (7.0, 3.0, config.save_s)


def test_a_watched_run_ends_without_its_watchdog_and_leaves_one_small_file(tmp_path):
    with Watchdog(WatchdogConfig(), World(), tmp_path / "run") as watchdog:
        watchdog.heartbeat.enter(Phase.STEP, 3)
        sidecar = identify(watchdog.sidecar_pid)
        until((tmp_path / "run" / "health" / "rank-00000.json").exists)
    assert not sidecar.is_alive
    [file] = [p for p in (tmp_path / "run" / "health").rglob("*") if p.is_file()]
    found = json.loads(file.read_text())
    assert (found["phase"], found["step"], found["ended"], found["pid"]) == ("step", 3, "cleanly", os.getpid())
    assert not (tmp_path / "run" / "exit").exists()


def test_switched_off_it_starts_and_writes_nothing_but_has_a_heartbeat(tmp_path):
    with Watchdog(WatchdogConfig(enabled=False), World(), tmp_path / "run") as watchdog:
        watchdog.heartbeat.enter(Phase.STEP, 3)
        assert watchdog.sidecar_pid is None
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_process_follow_each_other(tmp_path):
    for step in range(2):
        with Watchdog(WatchdogConfig(), World(), tmp_path) as watchdog:
            watchdog.heartbeat.enter(Phase.STEP, step)


def test_stacks_are_written_when_asked_for_and_the_signal_is_harmless_afterwards(tmp_path):
    with Watchdog(WatchdogConfig(), World(), tmp_path):
        os.kill(os.getpid(), STACKS_SIGNAL)
        stacks = tmp_path / "health" / "stacks" / "0001-rank-00000.txt"
        assert "test_stacks_are_written_when_asked_for" in stacks.read_text()
    os.kill(os.getpid(), STACKS_SIGNAL)
    assert stacks.exists()


def test_a_handler_of_crashes_that_is_there_stays(tmp_path):
    before = faulthandler.is_enabled()
    with Watchdog(WatchdogConfig(), World(), tmp_path):
        assert faulthandler.is_enabled()
    assert faulthandler.is_enabled() == before


@pytest.mark.parametrize(
    ("error", "ended"),
    [(RuntimeError("x"), "fault"), (SystemExit(78), "fault"), (SystemExit(0), "cleanly"), (SystemExit(), "cleanly")],
)
def test_leaving_by_an_error_is_told_apart_from_leaving_well(tmp_path, error, ended):
    def run():
        with Watchdog(WatchdogConfig(peer_grace_s=0.1), World(), tmp_path) as watchdog:
            started.append(identify(watchdog.sidecar_pid))
            raise error

    started = []
    with pytest.raises(type(error)):
        run()
    until(lambda: not started[0].is_alive)
    assert json.loads((tmp_path / "health" / "rank-00000.json").read_text())["ended"] == ended


def test_a_watchdog_that_was_ended_is_replaced_a_few_times_and_then_done_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat_module, "CHECK_EVERY_NS", 0)
    with Watchdog(WatchdogConfig(), World(), tmp_path) as watchdog:
        seen = []
        for _ in range(SIDECARS_AT_MOST):
            sidecar = identify(watchdog.sidecar_pid)
            seen.append(sidecar)
            os.kill(sidecar.pid, signal.SIGKILL)
            until(lambda: not sidecar.is_alive)  # noqa: B023
            watchdog.heartbeat.enter(Phase.STEP, 1)
        assert len(set(seen)) == SIDECARS_AT_MOST
        assert watchdog.sidecar_pid is None
        watchdog.heartbeat.enter(Phase.STEP, 2)
    assert [r.message for r in caplog.records if "going on without" in r.message]
    assert len([r for r in caplog.records if "starting another" in r.message]) == SIDECARS_AT_MOST - 1


def test_a_run_folder_that_cannot_be_written_is_a_storage_fault(tmp_path):
    (tmp_path / "file").write_text("")
    watchdog = Watchdog(WatchdogConfig(), World(), tmp_path / "file")
    with pytest.raises(StorageError):
        watchdog.__enter__()
    watchdog.heartbeat.close()


def test_no_setting_below_what_can_be_kept():
    for bad in ({"factor": 1.0}, {"poll_s": 0.0}, {"poll_s": 5.0}, {"data_s": -1.0}):
        with pytest.raises(ValueError, match="validation error"):
            WatchdogConfig(**bad)


def test_a_package_that_is_only_on_the_ranks_path_is_found_by_the_sidecar(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from dstrain.health.watchdog import *;"
        "from dstrain.base.world import World\n"
        "with Watchdog(WatchdogConfig(), World(), Path(sys.argv[2])) as w:\n"
        "    while not (Path(sys.argv[2]) / 'health' / 'rank-00000.json').exists(): assert w._sidecar.poll() is None\n"
    )
    root = str(heartbeat_module.__file__).rsplit("/dstrain/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code, root, str(tmp_path)], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0
