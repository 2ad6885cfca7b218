"""Preemption drill: any stop signal to any one rank in any phase of a real run; saved together, resumed to the same bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.health.signals import STOP_SIGNALS
from tests.support.http_range_server import RangeServer, serve_ranges
from tests.support.preemption import PHASES, STEPS, Chain, Result, Trial, build_shards_with_held_out_half
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

SOAK_CHAINS = 6  # of 7 phases and one import each: 48 trials


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def zygote(folder: Path) -> Iterator[Zygote]:
    with Zygote(folder / "zygote.log") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RangeServer]:
    with serve_ranges(build_shards_with_held_out_half(folder)) as server:
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
        chain.stop_in(Trial(phase, STOP_SIGNALS[number % len(STOP_SIGNALS)], rank=(number // 2) % 2))
    assert chain.finish() == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(SOAK_CHAINS))
def test_any_signal_to_any_rank_in_any_phase(
    zygote: Zygote, server: RangeServer, folder: Path, undisturbed: Result, seed: int
) -> None:
    chance = random.Random(seed)
    chain = Chain(zygote, server, folder, f"chain-{seed}")
    phases = [*PHASES, "import"]
    chance.shuffle(phases)
    for phase in phases:
        trial = Trial(phase, chance.choice(STOP_SIGNALS), chance.randrange(2))
        stopped = chain.stop_in(trial)
        print(f"seed {seed}: {trial} stopped at {stopped.step} in {stopped.seconds:.2f} s")
    assert chain.finish() == undisturbed
