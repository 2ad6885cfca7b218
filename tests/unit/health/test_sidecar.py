import dataclasses
import json
import os
import signal
import subprocess
import sys

from dstrain.health.heartbeat import Phase
from dstrain.health.incidents import HealthFolder
from dstrain.health.sidecar import Sidecar, main


def exit_file(folder, rank=0):
    return json.loads((folder / "exit" / f"rank-{rank:05d}.json").read_text())


def test_it_is_small_and_knows_neither_torch_nor_pydantic():
    code = (
        "import sys, dstrain.health.sidecar;"
        "print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'psutil'} & set(sys.modules)));"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    )
    heavy, size_kb = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "[]"
    assert int(size_kb) < 32_000  # about 18 MB, with room for another Python


def test_a_rank_that_makes_no_progress_is_ended_and_explained(settings, rank, heartbeat, tmp_path, capfd):
    heartbeat.enter(Phase.STEP, 12)
    Sidecar(settings).run()
    assert rank.wait(10) == -signal.SIGKILL
    found = exit_file(tmp_path)
    assert (found["code"], found["step"]) == (77, 12)
    assert "makes no progress in phase step of step 12" in found["cause"]
    report = json.loads((tmp_path / "health" / "hang-report.json").read_text())
    assert report["line"] == found["cause"]
    assert capfd.readouterr().err == f"dstrain watchdog: {found['cause']}\n"


def test_what_the_rank_said_itself_stands(settings, rank, heartbeat, tmp_path):
    heartbeat.enter(Phase.STEP, 12)
    sidecar = Sidecar(settings)
    (tmp_path / "exit").mkdir()
    (tmp_path / "exit" / "rank-00000.json").write_text('{"code": 78}')
    sidecar.run()
    assert exit_file(tmp_path) == {"code": 78}


def test_what_an_earlier_start_said_does_not(settings, rank, heartbeat, tmp_path):
    (tmp_path / "exit").mkdir()
    (tmp_path / "exit" / "rank-00000.json").write_text('{"code": 0}')
    heartbeat.enter(Phase.STEP, 12)
    Sidecar(settings).run()
    assert exit_file(tmp_path)["code"] == 77


def test_a_rank_that_has_gone_before_is_no_fault_of_the_watchdog(settings, rank):
    rank.kill()
    rank.wait()
    assert main([json.dumps(settings.to_plain())]) == 0


def test_storage_that_does_not_answer_does_not_save_a_hung_rank(settings, rank, heartbeat, monkeypatch, capfd):
    settings = dataclasses.replace(settings, report_s=0.2)
    sidecar = Sidecar(settings)
    gate, held = os.pipe()
    monkeypatch.setattr(HealthFolder, "alarm", lambda _self: os.read(gate, 1) and None)
    heartbeat.enter(Phase.STEP, 5)
    sidecar.run()
    assert rank.wait(10) == -signal.SIGKILL
    assert "hangs, and so does the run folder" in capfd.readouterr().err
    os.write(held, b"x")
    os.close(held)


def test_a_heartbeat_that_goes_on_keeps_the_rank_alive(settings, rank, heartbeat, tmp_path):
    sidecar = Sidecar(settings)
    for step in range(20):  # each look finds another step
        heartbeat.enter(Phase.STEP, step)
        facts = sidecar._view.facts(sidecar._view.beat())
        assert facts["time_in_phase_s"] < 0.1
        assert sidecar._round(facts) is None
        sidecar._clerk._idle.wait(10)
    heartbeat.close()
    sidecar.run()
    assert rank.poll() is None
    assert not list((tmp_path / "health").glob("incident-*"))
