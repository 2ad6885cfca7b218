"""A real run whose rank is stopped or killed: named, ended, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint.reader import newest_valid
from dstrain.health.hang_report import in_collective
from dstrain.health.watched_process import identify
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, wait_for, write_config
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

MIN_STEP_BUDGET_S = 3.0
SLACK_S = 20.0
"""For two ranks and two watchdogs on two cores that others use, too."""
WATCHDOG = {
    "min_step_budget_s": MIN_STEP_BUDGET_S,
    "data_s": MIN_STEP_BUDGET_S,
    "publish_s": 0.5,
    "peer_grace_s": SLACK_S,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def _prepare(tmp_path: Path, shards: Path) -> tuple[Path, Path]:
    run = tmp_path / "run"
    settings = pretrain_settings(shards, run, train={"max_steps": 100_000}, watchdog=WATCHDOG)
    return run, write_config(tmp_path / "run.yaml", settings)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _exits(run: Path) -> list[dict[str, Any]]:
    return [_read(path) for path in sorted((run / "exit").glob("rank-*.json"))]


def _wait_for_no_watchdogs(run: Path) -> None:
    """Sidecars are recognised by the run folder in their settings."""
    deadline = time.monotonic() + SLACK_S
    while True:
        left = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes()
            except OSError:
                continue
            process = identify(int(path.parent.name))
            if b"dstrain.health.sidecar" in command and str(run).encode() in command and process and process.is_alive:
                left.append(process.pid)
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_stopped_rank_is_named_and_the_run_goes_on_when_it_is_started_again(
    tmp_path: Path, shards: Path, zygote: Zygote
) -> None:
    run, config = _prepare(tmp_path, shards)
    with zygote.start_ranks(config, world_size=2) as job:
        wait_for(lambda: max(step_events(run), default=0) >= 8, job=job)
        stopped_at = time.monotonic()
        job.signal(signal.SIGSTOP, ranks=[1])
        assert job.wait() == [-signal.SIGKILL] * 2, job.output()
        assert time.monotonic() - stopped_at < MIN_STEP_BUDGET_S + 5 + 5 + SLACK_S
        assert job.output().count("dstrain watchdog: ") == 1
    report = _read(run / "health" / "hang-report.json")
    assert (report["finding"]["cause"], report["finding"]["rank"]) == ("stopped", 1), report["line"]
    assert report["finding"]["host"] == os.uname().nodename
    assert [e["code"] for e in _exits(run)] == [76, 77]
    assert {e["cause"] for e in _exits(run)} == {report["line"]}
    assert in_collective(report["ranks"][0]["frames"]), report["ranks"][0]["frames"]
    assert "in run_training" in (run / "health" / "stacks" / "0001-rank-00000.txt").read_text()
    _wait_for_no_watchdogs(run)

    assert newest_valid(run / "checkpoints").checkpoint is not None
    goal = max(step_events(run)) + 3
    with zygote.start_ranks(config, f"train.max_steps={goal}", world_size=2) as again:
        again.succeed()
    assert max(step_events(run)) == goal
    assert [e["code"] for e in _exits(run)] == [0, 0]
    assert [_read(p)["ended"] for p in sorted((run / "health").glob("rank-*.json"))] == ["cleanly"] * 2


def test_a_killed_rank_ends_the_other_one_within_seconds(tmp_path: Path, shards: Path, zygote: Zygote) -> None:
    run, config = _prepare(tmp_path, shards)
    with zygote.start_ranks(config, world_size=2) as job:
        wait_for(lambda: max(step_events(run), default=0) >= 4, job=job)
        killed_at = time.monotonic()
        job.signal(signal.SIGKILL, ranks=[1])
        codes = job.wait()
        assert time.monotonic() - killed_at < 5.0 + SLACK_S
        assert codes == [76, -signal.SIGKILL], job.output()
        assert "Traceback" not in job.output()
        assert job.output().count("dstrain: error: another rank is gone") == 1, job.output()
    report = _read(run / "health" / "hang-report.json")
    assert (report["finding"]["cause"], report["finding"]["rank"]) == ("died", 1), report["line"]
    first, second = _exits(run)
    assert (first["code"], first["kind"], first["rank"]) == (76, "peer", 0)
    assert re.search(r"another rank is gone .* noticed in phase (step|data|save) of step \d+: ", first["cause"])
    assert (second["code"], second["kind"], second["rank"]) == (76, "fault", 1)
    assert "died in phase" in second["cause"]
    _wait_for_no_watchdogs(run)
