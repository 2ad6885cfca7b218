"""StableAdamW, LAMB and Muon: the same weights at every world size and ZeRO stage, and state that any of them goes on from."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.manifest import Fragment
from dstrain.checkpoint.reader import Checkpoint
from tests.support.optimizer_worker import KINDS, LAST, SAVED, SETUPS, WORLDS, name
from tests.support.runs import Job

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimizers")
    jobs = [
        Job(["-m", "tests.support.optimizer_worker", str(root)], world_size=world, log_folder=root / f"logs-{world}")
        for world in WORLDS
    ]
    try:
        for job in jobs:
            job.succeed(timeout_s=300)
    finally:
        for job in jobs:
            job.signal(signal.SIGKILL)
    return root


def losses(matrix: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for world in WORLDS:
        found.update(json.loads((matrix / f"losses-{world}.json").read_text()))
    return found


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder / f"step-{step:08d}")
    states = {state for some in checkpoint.manifest.parameter_states.values() for state in some}
    found = {}
    for parameter in checkpoint.manifest.parameters:
        for state in checkpoint.manifest.parameter_states.get(parameter, checkpoint.manifest.states):
            found[f"{parameter}|{state}"] = whole(checkpoint, parameter, state)
    assert ("momentum_buffer" in states) == ("muon" in folder.name)
    return found


def whole(checkpoint: Checkpoint, parameter: str, state: str) -> torch.Tensor:
    tensor = torch.empty(torch.Size(checkpoint.manifest.parameters[parameter]).numel())
    checkpoint.load_into([Fragment(parameter, state, 0, tensor)])
    return tensor


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_state_do_not_depend_on_world_size_or_stage(matrix: Path, kind: str) -> None:
    reference = tensors(matrix / name(1, 0, "fp32", kind), LAST)
    assert all(t.abs().sum() > 0 for t in reference.values()), "state must have moved"
    for world in WORLDS:
        for stage, precision in SETUPS:
            found = tensors(matrix / name(world, stage, precision, kind), LAST)
            assert found.keys() == reference.keys()
            for key, tensor in found.items() if precision == "fp32" else ():
                torch.testing.assert_close(
                    tensor, reference[key], rtol=5e-3, atol=2e-4, msg=lambda m, k=key, w=world, s=stage: f"{k} {w} {s} {m}"
                )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_world_size_or_set_up(matrix: Path, kind: str) -> None:
    found = losses(matrix)
    reference = found[name(1, 0, "fp32", kind)]
    assert len(reference) == LAST
    assert reference[-1] < reference[0]
    for world in WORLDS:
        for stage, precision in SETUPS:
            near = 1e-4 if precision == "fp32" else 1e-2
            assert found[name(world, stage, precision, kind)] == pytest.approx(reference, rel=near), (world, stage)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_at_the_same_world_and_set_up_is_bit_identical(matrix: Path, kind: str) -> None:
    found = losses(matrix)
    for world in WORLDS:
        for stage, precision in SETUPS:
            own = name(world, stage, precision, kind)
            assert found[f"{own}-to-{own}"] == found[own][SAVED:]
            straight, resumed = (
                tensors(matrix / own, LAST), tensors(matrix / "resumed" / f"{own}-to-{own}", LAST)
            )  # fmt: skip
            assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_at_another_world_and_set_up_goes_on_alike(matrix: Path, kind: str) -> None:
    found = losses(matrix)
    crossings = [key for key in found if "-to-" in key and kind in key and len(set(key.split("-to-"))) == 2]
    assert len(crossings) == len(WORLDS) * len(SETUPS)
    for key in crossings:
        source = key.split("-to-")[0]
        assert found[key] == pytest.approx(found[source][SAVED:], rel=1e-2 if "bf16" in key else 1e-4)
