"""Several processes save behind their work: what was copied is what is saved, and any rank's fault is everybody's knowledge."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.reader import Checkpoint, newest_valid
from tests.support.async_checkpoint_worker import SCENARIOS, whole_state
from tests.support.runs import Job

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=[2, 3])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all scenarios of a world have left their checkpoints."""
    root = tmp_path_factory.mktemp(f"world-{request.param}")
    job = Job(
        ["-m", "tests.support.async_checkpoint_worker", str(root), "all"],
        world_size=request.param,
        log_folder=root / "logs",
    )
    with job:
        job.succeed(timeout_s=200)
    return root


def test_every_scenario_was_played(finished: Path) -> None:
    log = (finished / "logs" / "rank-0.log").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("passed ")] == list(SCENARIOS)


@pytest.mark.parametrize(
    ("scenario", "step"), [("moving", 1), ("pressed", 1), ("pressed", 2), ("one_fails", 3), ("full", 3)]
)
def test_what_is_saved_is_what_was_there_when_start_was_called(finished: Path, scenario: str, step: int) -> None:
    checkpoint = Checkpoint(finished / scenario / f"step-0000000{step}")
    checkpoint.verify()
    for state, expected in whole_state(step).items():
        assert torch.equal(checkpoint.tensors(state)["w"].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_nothing_is_left_but_whole_checkpoints_without_any_report(finished: Path, scenario: str) -> None:
    for path in (finished / scenario).iterdir():
        assert path.name.startswith("step-")
        names = {p.name for p in path.iterdir()}
        assert names == {"manifest.json", *Checkpoint(path).manifest.files}


def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    job = Job(
        ["-m", "tests.support.async_checkpoint_worker", str(tmp_path), "killed"],
        world_size=2,
        log_folder=tmp_path / "logs",
    )
    with job:
        codes = job.wait(120)
    assert codes[1] == -signal.SIGKILL, job.output()
    assert codes[0] != 0
    found = newest_valid(tmp_path / "killed")
    assert found.checkpoint is not None
    assert (found.checkpoint.manifest.step, found.damaged) == (1, ())


def test_ranks_write_equal_shares_at_every_stage(tmp_path: Path) -> None:
    job = Job(
        ["-m", "tests.support.async_checkpoint_worker", str(tmp_path), "balance"],
        world_size=3,
        log_folder=tmp_path / "logs",
    )
    with job:
        job.succeed(timeout_s=200)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("balanced ")] == ["0", "1", "2", "3"]
