"""Before the first step, with real ranks: one that never comes, machines that cannot take part, and a stop request while waiting."""

from __future__ import annotations

import json
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import build_tiny_shards, free_port, pretrain_job, pretrain_settings, wait_for, write_config

pytestmark = [pytest.mark.fault, pytest.mark.dist]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def exits(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "exit").glob("rank-*.json"))]


def test_a_rank_that_never_comes_is_named_long_before_a_collective_would_give_up(tmp_path: Path, shards: Path) -> None:
    settings = pretrain_settings(shards, tmp_path / "run", start={"join_s": 15.0}, engine={"timeout_s": 600})
    config = write_config(tmp_path / "run.yaml", settings)
    three = {"WORLD_SIZE": "3", "LOCAL_SIZE": "3"}
    with pretrain_job(config, world_size=2, environment=three) as job:
        assert job.wait(120) == [76, 76]
    said = job.output()
    assert "rank 2 of 3 did not come to 127.0.0.1" in said
    assert "within 15 s (start.join_s)" in said
    assert "Traceback" not in said
    assert [(left["code"], left["kind"], left["phase"]) for left in exits(tmp_path / "run")] == [
        (76, "peer", "rendezvous")
    ] * 2


def test_a_host_that_shows_no_gpu_is_named_in_the_exit_file_that_slurm_scripts_read(
    tmp_path: Path, shards: Path
) -> None:
    settings = pretrain_settings(shards, tmp_path / "run", engine={"device": "cuda"})
    config = write_config(tmp_path / "run.yaml", settings)
    with pretrain_job(config, world_size=2, environment={"CUDA_VISIBLE_DEVICES": ""}) as job:
        assert job.wait(120)[0] == 77
    left = exits(tmp_path / "run")[0]  # the other one may be ended by its watchdog while it still starts
    assert (left["rank"], left["code"], left["kind"], left["host"]) == (0, 77, "fault", socket.gethostname())
    assert "engine.device: cuda is asked for" in left["cause"]


def test_a_stop_request_ends_the_wait_for_ranks_that_have_not_come(tmp_path: Path, shards: Path) -> None:
    settings = pretrain_settings(shards, tmp_path / "run", start={"join_s": 600.0})
    config = write_config(tmp_path / "run.yaml", settings)
    four = {"WORLD_SIZE": "4", "LOCAL_SIZE": "4"}
    with pretrain_job(config, world_size=3, environment=four) as job:
        wait_for(lambda: (tmp_path / "run/health/rank-00002.json").exists(), job=job)
        time.sleep(0.5)
        job.signal(signal.SIGTERM, ranks=[2])
        assert job.wait(120) == [75, 75, 75]
    assert [(left["code"], left["kind"]) for left in exits(tmp_path / "run")] == [(75, "request")] * 3


def test_a_host_without_the_interface_that_is_asked_for_ends_the_start_of_all_at_once(
    tmp_path: Path, shards: Path
) -> None:
    settings = pretrain_settings(shards, tmp_path / "run", start={"join_s": 600.0}, engine={"interface": "eth-none"})
    config = write_config(tmp_path / "run.yaml", settings)
    with pretrain_job(config, world_size=2) as job:
        assert job.wait(120) == [78, 78]
    assert "engine.interface: 'eth-none' does not exist on" in job.logs[0].read_text()
    assert "Traceback" not in job.output()


def test_a_rank_that_cannot_write_to_the_run_folder_does_not_let_the_others_wait_for_it(
    tmp_path: Path, shards: Path
) -> None:
    (tmp_path / "run/health/stacks/0001-rank-00001.txt").mkdir(parents=True)  # where rank 1 alone is to write
    settings = pretrain_settings(shards, tmp_path / "run", start={"join_s": 600.0})
    config = write_config(tmp_path / "run.yaml", settings)
    with pretrain_job(config, world_size=2) as job:
        assert job.wait(120) == [76, 76]
    assert "0001-rank-00001.txt: cannot be written" in job.logs[1].read_text()
    assert "error" not in job.logs[0].read_text(), "the rank at fault speaks, and no other"
    assert [(left["code"], left["kind"]) for left in exits(tmp_path / "run")] == [(76, "peer"), (76, "fault")]


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_host_that_lacks_the_configuration_does_not_let_the_others_wait_for_it(
    tmp_path: Path, shards: Path, lacking: int
) -> None:
    """The ranks of one host read the same file and so find the same fault; those of other hosts may not."""
    settings = pretrain_settings(shards, tmp_path / "run", start={"join_s": 600.0})
    config = write_config(tmp_path / "run.yaml", settings)
    configs = [config, config]
    configs[lacking] = tmp_path / "elsewhere.yaml"
    port = str(free_port())
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(pretrain_job(configs[rank], world_size=1, environment=host_of(rank, port=port)))
            for rank in range(2)
        ]
        assert [job.wait(100) for job in jobs] == [[78], [78]]
    assert "elsewhere.yaml" in jobs[lacking].output()
    assert "dstrain: error" not in jobs[1 - lacking].output(), "the rank at fault speaks, and no other"
    (left,) = exits(tmp_path / "run")
    assert (left["rank"], left["kind"]) == (1 - lacking, "peer")
    assert "elsewhere.yaml" in left["cause"]


def host_of(rank: int, *, port: str) -> dict[str, str]:
    """The only rank of a host of its own, of two."""
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_PORT": port}


def test_a_file_that_rank_0_cannot_write_before_the_first_step_is_told_by_it_and_by_no_other(
    tmp_path: Path, shards: Path
) -> None:
    (tmp_path / "run/environment.json").mkdir(parents=True)
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, tmp_path / "run"))
    with pretrain_job(config, world_size=2) as job:
        assert job.wait(100) == [76, 76]
    assert "environment.json" in job.logs[0].read_text()
    assert "another rank is gone" not in job.output()
    assert [(left["code"], left["kind"]) for left in exits(tmp_path / "run")] == [(76, "fault"), (76, "peer")]


def test_the_checks_before_the_first_step_are_one_event_and_one_line(tmp_path: Path, shards: Path) -> None:
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, tmp_path / "run", train={"max_steps": 2}))
    with pretrain_job(config, world_size=2) as job:
        job.succeed()
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "start_checks"]
    assert {finding["check"] for finding in event["findings"]} >= {"shared folder", "disk", "network"}
    assert event["network"]["bus_gb_s"] > 0
    assert "checked before the first step in" in job.logs[0].read_text()
    assert not list((tmp_path / "run").glob(".start-check-*"))
    off = (
        "start.shared_folder=false",
        "start.disk=false",
        "start.network=false",
        "start.gpu=false",
        "start.clock=false",
    )
    with pretrain_job(config, *off, "train.max_steps=3", world_size=2) as job:
        job.succeed()
    assert "checked before" not in job.logs[0].read_text()
