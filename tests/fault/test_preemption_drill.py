"""Preemption drill: any stop signal to any one rank in any phase of a real run; saved together, resumed to the same bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.checkpoint.layout import published_steps
from dstrain.health.signals import STOP_SIGNALS
from tests.support.http_range_server import RangeServer, serve_ranges
from tests.support.preemption import (
    AT_ONCE_S,
    PHASES,
    STEPS,
    Chain,
    Result,
    Trial,
    build_shards_with_many_held_out,
    preemptions,
)
from tests.support.runs import step_events, wait_for
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RangeServer]:
    with serve_ranges(build_shards_with_many_held_out(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, server: RangeServer, folder: Path) -> Result:
    result = Chain(zygote, server, folder, "undisturbed").finish()
    assert sorted(result.curve) == list(range(1, STEPS + 1))
    return result


def test_a_run_that_is_stopped_in_every_phase_ends_with_the_same_bytes(
    zygote: Zygote, server: RangeServer, folder: Path, undisturbed: Result
) -> None:
    chain = Chain(zygote, server, folder, "stopped")
    for number, phase in enumerate((*PHASES, "import")):
        trial = Trial(phase, STOP_SIGNALS[number % 4], rank=(number // 2) % 2, group=phase in ("evaluation", "save"))
        chain.stop_in(trial)
    assert chain.finish() == undisturbed


def test_a_save_file_saves_and_a_stop_file_ends_the_run_until_it_is_removed(
    zygote: Zygote, server: RangeServer, folder: Path, undisturbed: Result
) -> None:
    chain = Chain(zygote, server, folder, "files")
    chain.run.mkdir()
    with chain.start("checkpoint.every_steps=1000") as job:  # so that what is saved was asked for
        wait_for(lambda: max(step_events(chain.run), default=0) >= 2, job=job)
        (chain.run / "save").touch()
        wait_for(lambda: bool(published_steps(chain.run / "checkpoints")), job=job)
        assert not (chain.run / "save").exists()
        (chain.run / "stop").write_text("looks wrong\n")
        assert job.wait() == [82, 82], job.output()
    exits = chain.exits()
    assert exits[0]["cause"] == "stop file: looks wrong"
    assert [e["name"] for e in exits] == ["saved_end"] * 2
    saved = max(step for step, _ in published_steps(chain.run / "checkpoints"))
    assert [e["step"] for e in exits] == [saved] * 2
    with chain.start() as job:  # the next one of a chain of jobs
        assert job.wait() == [82, 82], job.output()
    assert max(step_events(chain.run)) <= saved + 1
    (chain.run / "stop").unlink()
    assert chain.finish() == undisturbed


def test_the_end_of_a_slurm_job_is_seen_coming_and_the_requeued_job_goes_on(
    zygote: Zygote, server: RangeServer, folder: Path, undisturbed: Result
) -> None:
    """A controller that first gives an hour, and then, as if the limit had been cut, a minute."""
    squeue, answer = folder / "bin" / "squeue", folder / "answer"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\ncat '{answer}'\n")
    squeue.chmod(0o755)
    answer.write_text("N/A|1:00:00\n")
    slurm = {"SLURM_JOB_ID": "4711", "PATH": f"{squeue.parent}{os.pathsep}{os.environ['PATH']}"}
    chain = Chain(zygote, server, folder, "slurm")
    with chain.start("train.max_steps=100000", environment=slurm) as job:
        wait_for(lambda: max(step_events(chain.run), default=0) >= 2, job=job)
        answer.write_text("N/A|1:00\n")
        assert job.wait() == [75, 75], job.output()
    assert chain.exits()[0]["cause"] == "the end of the SLURM job is near"
    assert max(step for step, _ in published_steps(chain.run / "checkpoints")) == chain.exits()[1]["step"]


def test_a_spent_budget_ends_the_run_for_good(zygote: Zygote, server: RangeServer, folder: Path) -> None:
    chain = Chain(zygote, server, folder, "budget")
    with chain.start("stop.max_tokens=2000") as job:
        assert job.wait() == [82, 82], job.output()
    exits = chain.exits()
    assert {e["cause"] for e in exits} == {"stop.max_tokens: 2000 are done"}
    tokens = [event["tokens"] for _, event in sorted(step_events(chain.run).items())]
    assert tokens[-3] < 2000 <= tokens[-1]  # seen after a step, agreed in the next


def test_a_stop_file_ends_a_start_up_whose_store_does_not_answer(
    zygote: Zygote, server: RangeServer, folder: Path
) -> None:
    """Rank 0 hears of it in a thread, rank 1 from rank 0; nothing is there, and nothing has to be saved."""
    chain = Chain(zygote, server, folder, "unanswered")
    with server.hold("/tokenizer/"), chain.start(f"data.path={server.url}") as job:
        wait_for(lambda: server.waiting >= 2, job=job)
        asked = time.monotonic()
        (chain.run / "stop").touch()
        assert job.wait() == [82, 82], job.output()
        assert time.monotonic() - asked < AT_ONCE_S
    assert [e["step"] for e in chain.exits()] == [None, None]
    assert "Traceback" not in job.output()
    assert not (chain.run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_signal_to_any_process_in_any_phase(tmp_path: Path) -> None:
    """The full tier; `python benchmarks/preemption.py` writes its table."""
    drill = preemptions(tmp_path, 200, seed=1, say=print)
    assert drill.failures == []
    assert drill.trials >= 200
