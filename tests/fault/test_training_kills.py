"""Real training is killed at random instants and in saves; the run that goes on ends with every byte of an undisturbed one.

Many more: `python benchmarks/soak.py --parts training`.
"""

from __future__ import annotations

import signal

import pytest

from dstrain.checkpoint.layout import published_steps
from tests.support.runs import step_events, wait_for
from tests.support.training_trials import EVERY, STEPS, Setting, TrainingBench, differences, end_of, random_kills
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.fault, pytest.mark.dist]

SEED = 20261127
SETTING = Setting(2, 1, "bf16")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> TrainingBench:
    return TrainingBench(tmp_path_factory.mktemp("training-kills") / "runs", zygote)


def test_a_run_killed_some_steps_after_a_save_goes_on_bit_for_bit(bench: TrainingBench) -> None:
    expected, _ = bench.reference(SETTING)
    assert set(expected["curve"]) == set(range(1, STEPS + 1))
    run = bench.fresh(SETTING)
    with bench.start(run, SETTING) as job:
        wait_for(
            lambda: max(step_events(run), default=0) > EVERY and bool(published_steps(run / "checkpoints")), job=job
        )
        job.signal(signal.SIGKILL)
        job.wait(30)
    assert published_steps(run / "checkpoints"), "killed before anything was saved: the test has lost its meaning"
    assert max(step for step, _ in published_steps(run / "checkpoints")) < STEPS
    with bench.start(run, SETTING) as job:
        job.succeed()
    assert differences(expected, end_of(run), "resumed") == []


def test_ranks_killed_at_random_instants_cost_the_steps_since_the_last_save_and_not_a_bit(bench: TrainingBench) -> None:
    kills = random_kills(bench, 6, seed=SEED, settings=(SETTING, Setting(2, 3, "fp32")))
    assert kills.failures == []
    assert kills.trials == 6
