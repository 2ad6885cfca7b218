"""Watchdogs beside real processes that hang or die in every way: noticed, named, ended; nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.health.watched_process import ProcessId, identify
from tests.support.runs import ROOT, Job
from tests.support.watched_rank import COLLECTIVE

pytestmark = pytest.mark.fault

QUICK = {
    "min_step_budget_s": 1.0, "first_step_s": 1.0, "start_up_s": 60.0, "data_s": 1.0, "save_s": 1.0, "poll_s": 0.05,
    "publish_s": 0.2, "report_s": 3.0, "peer_grace_s": 1.0,
}  # fmt: skip
SLACK_S = 20.0
"""Bounds below are the documented ones plus this much for a busy machine with two cores."""


class Ranks:
    """Fake ranks under watch, and everything they have started."""

    def __init__(
        self, folder: Path, mischief: str, *, guilty: int = 1, step: int = 4, phase: str = "step", world: int = 2, **settings: Any
    ):  # fmt: skip
        self.folder = folder / "run"
        source = self.folder / "torch" / "distributed" / "collective.py"
        source.parent.mkdir(parents=True)
        source.write_text(COLLECTIVE)
        command = [
            str(ROOT / "tests/support/watched_rank.py"), str(self.folder), mischief, str(guilty), str(step), phase,
            json.dumps({**QUICK, **settings}),
        ]  # fmt: skip
        self.job = Job(command, world_size=world, log_folder=folder / "logs", environment={"PYTHONPATH": str(ROOT)})
        self.world = world

    def pids(self) -> list[dict[str, ProcessId]]:
        deadline = time.monotonic() + SLACK_S
        paths = [self.folder / f"pids-{rank}.json" for rank in range(self.world)]
        found: list[dict[str, ProcessId]] = []
        for path in paths:
            while True:
                try:
                    numbers = json.loads(path.read_text())
                    break
                except (OSError, ValueError):
                    assert time.monotonic() < deadline, self.job.output()
                    time.sleep(0.01)
            found.append({name: identify(pid) or ProcessId(pid, -1) for name, pid in numbers.items()})
        return found

    def end(self) -> list[int]:
        """Exit codes; then waits until nothing that the ranks started is left."""
        pids = self.pids()
        codes = self.job.wait(60)
        deadline = time.monotonic() + SLACK_S
        left = [(rank, name) for rank, owned in enumerate(pids) for name in owned]
        while left:
            assert time.monotonic() < deadline, f"still running: {left}\n{self.job.output()}"
            left = [(rank, name) for rank, name in left if pids[rank][name].is_alive]
            time.sleep(0.01)
        return codes

    def wait_until_watched(self) -> None:
        deadline = time.monotonic() + SLACK_S
        while not (self.folder / "arrived-0-0").exists():
            assert time.monotonic() < deadline, self.job.output()
            time.sleep(0.005)

    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "health" / "hang-report.json").read_text())

    def exits(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "exit").glob("*.json"))]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        with self.job:
            pass
        for path in self.folder.glob("pids-*.json"):
            for pid in json.loads(path.read_text()).values():
                process = identify(pid)
                if process is not None and process.is_alive and _belongs_to(process.pid, self.folder):
                    os.kill(process.pid, signal.SIGKILL)


def _belongs_to(pid: int, folder: Path) -> bool:
    try:
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("mischief", "phase", "cause", "code"),
    [
        ("stop", "step", "stopped", 77),
        ("gil", "step", "hung", 77),
        ("spin", "step", "hung", 77),
        ("sleep", "data", "storage", 76),
        ("sleep", "save", "storage", 76),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_are_ended(
    tmp_path: Path, mischief: str, phase: str, cause: str, code: int
) -> None:
    with Ranks(tmp_path, mischief, phase=phase, world=3) as ranks:
        assert ranks.end() == [-signal.SIGKILL] * 3
        report = ranks.report()
        assert (report["finding"]["cause"], report["finding"]["rank"]) == (cause, 1), report
        assert report["finding"]["host"] == os.uname().nodename
        assert [(e["code"], e["kind"]) for e in ranks.exits()] == [(76, "peer"), (code, "fault"), (76, "peer")]
        assert {e["cause"] for e in ranks.exits()} == {report["line"]}
        logged = ranks.job.output()
        assert logged.count("dstrain watchdog: ") == 1
        assert report["line"] in logged
        stacks = [p.read_text() for p in sorted((ranks.folder / "health" / "stacks").iterdir())]
        assert "all_reduce" in stacks[0]
        assert ("misbehave" in stacks[1]) == (mischief != "stop")
        assert [r["ended"] for r in _live(ranks)] == ["killed"] * 3


def _live(ranks: Ranks) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((ranks.folder / "health").glob("rank-*.json"))]


def test_a_stopped_rank_is_noticed_in_a_phase_that_may_last_long(tmp_path: Path) -> None:
    """Those who wait for it are in the same long phase."""
    with Ranks(tmp_path, "stop", phase="save", save_s=600.0, first_step_s=600.0) as ranks:
        assert ranks.end() == [-signal.SIGKILL] * 2
        assert (ranks.report()["finding"]["cause"], ranks.report()["finding"]["rank"]) == ("stopped", 1)
        assert "stopped for" in ranks.report()["alarm"]["detail"]


@pytest.mark.parametrize(
    ("mischief", "said"),
    [
        ("SIGKILL", "killed, or ended without a word"),
        ("exit", "killed, or ended without a word"),
        ("segv", "Segmentation fault"),
        ("abort", "Aborted"),
    ],
)
def test_a_rank_that_dies_takes_the_waiting_ones_with_it(tmp_path: Path, mischief: str, said: str) -> None:
    with Ranks(tmp_path, mischief, guilty=0, min_step_budget_s=300.0, first_step_s=300.0) as ranks:
        codes = ranks.end()
        assert codes[1] == -signal.SIGKILL
        assert codes[0] != 0
        report = ranks.report()
        assert (report["finding"]["cause"], report["finding"]["rank"]) == ("died", 0)
        assert said in report["finding"]["reason"]
        first, second = ranks.exits()
        assert (first["code"], first["kind"]) == (76, "fault")
        assert (second["code"], second["kind"]) == (76, "peer")
        assert (first["step"], second["step"]) == (4, 4)
        assert "process" in first["cause"]
        assert said in second["cause"]


def test_peers_stop_within_five_seconds_of_a_death_at_the_default_settings(tmp_path: Path) -> None:
    defaults = {"poll_s": 0.25, "publish_s": 5.0, "report_s": 5.0, "peer_grace_s": 2.0, "first_step_s": 300.0}
    with Ranks(tmp_path, "sleep", guilty=0, world=2, **defaults) as ranks:
        pids = ranks.pids()
        while not (ranks.folder / "arrived-4-1").exists():
            time.sleep(0.01)
        killed_at = time.monotonic()
        os.kill(pids[0]["rank"].pid, signal.SIGKILL)
        ranks.job.processes[1].wait(60)
        assert time.monotonic() - killed_at < 5.0 + SLACK_S / 4
        ranks.end()


def test_a_rank_that_leaves_with_a_fault_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    with Ranks(tmp_path, "exception", min_step_budget_s=300.0, first_step_s=300.0) as ranks:
        assert ranks.end() == [-signal.SIGKILL, 1]
        assert (ranks.report()["finding"]["cause"], ranks.report()["finding"]["rank"]) == ("left", 1)
        [first] = ranks.exits()  # the rank that left speaks for itself
        assert (first["rank"], first["code"]) == (0, 76)


def test_a_peer_that_fails_by_itself_after_a_death_is_neither_killed_nor_spoken_for(tmp_path: Path) -> None:
    with Ranks(tmp_path, "SIGKILL", guilty=0, first_step_s=300.0, patience_s=3.0, peer_grace_s=60.0) as ranks:
        assert ranks.end() == [-signal.SIGKILL, 1]
        assert "a peer is gone" in ranks.job.output()
        assert [e["rank"] for e in ranks.exits()] == [0]
        assert [r["ended"] for r in _live(ranks)] == ["died", "fault"]


def test_a_slow_phase_within_its_allowance_is_no_hang_for_those_who_wait(tmp_path: Path) -> None:
    with Ranks(tmp_path, "slow", phase="data", data_s=60.0, publish_s=1.0) as ranks:  # 2.5 s; a step may last 1 s
        assert ranks.end() == [0, 0], ranks.job.output()
        assert not (ranks.folder / "exit").exists()
        assert sorted(p.name for p in (ranks.folder / "health").iterdir()) == [
            "rank-00000.json",
            "rank-00001.json",
            "stacks",
        ]
        assert list((ranks.folder / "health" / "stacks").iterdir()) == []
        assert [r["ended"] for r in _live(ranks)] == ["cleanly", "cleanly"]


def test_a_killed_watchdog_leaves_the_rank_alone(tmp_path: Path) -> None:
    with Ranks(tmp_path, "slow", phase="data", data_s=60.0, publish_s=1.0) as ranks:
        ranks.wait_until_watched()
        os.kill(ranks.pids()[0]["sidecar"].pid, signal.SIGKILL)
        assert ranks.end() == [0, 0], ranks.job.output()


def test_a_world_of_one_that_a_person_has_paused_goes_on_when_it_is_told_to(tmp_path: Path) -> None:
    with Ranks(tmp_path, "stop", guilty=0, world=1) as ranks:
        rank = ranks.pids()[0]["rank"]
        deadline = time.monotonic() + 3.0  # three times the allowance: nothing must happen
        while time.monotonic() < deadline:
            assert ranks.job.processes[0].poll() is None, ranks.job.output()
            time.sleep(0.05)
        os.kill(rank.pid, signal.SIGCONT)
        assert ranks.end() == [0], ranks.job.output()


def test_a_second_job_on_the_same_folder_cannot_end_the_first(tmp_path: Path) -> None:
    """The second job (another port) dies at once; its alarm is not for the first one."""
    with Ranks(tmp_path, "slow", phase="data", data_s=60.0, publish_s=1.0) as ranks:
        ranks.wait_until_watched()
        environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
        code = (
            "import os, sys, json; from pathlib import Path; from dstrain.base.world import world_from_environment as w;"
            "from dstrain.health.watchdog import *;"
            "d = Watchdog(WatchdogConfig(**json.loads(sys.argv[2])), w(), Path(sys.argv[1])).__enter__();"
            "print(d.sidecar_pid, flush=True); sys.stdin.readline(); os._exit(9)"
        )
        second = subprocess.Popen(
            [sys.executable, "-c", code, str(ranks.folder), json.dumps(QUICK)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        sidecar = identify(int(second.stdout.readline()))
        rank_file = ranks.folder / "health" / "rank-00000.json"
        while json.loads(rank_file.read_text())["pid"] != second.pid:
            time.sleep(0.002)
        second.communicate("die\n")
        while sidecar.is_alive:
            time.sleep(0.01)
        alarm = json.loads((ranks.folder / "health" / "incident-0001-alarm.json").read_text())
        assert alarm["pid"] == second.pid
        assert ranks.end() == [0, 0], ranks.job.output()
