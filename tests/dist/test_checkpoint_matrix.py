"""Worlds {1,2,3} × ZeRO stages {0,1,2,3} × {fp32, bf16}: every crossing keeps the fp32 state bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.manifest import STATES
from dstrain.checkpoint.reader import Checkpoint
from tests.support.matrix_worker import PRECISIONS, STAGES, WORLDS, name
from tests.support.runs import Job

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matrix")
    jobs = [
        Job(["-m", "tests.support.matrix_worker", str(root)], world_size=world, log_folder=root / f"logs-{world}")
        for world in WORLDS
    ]
    try:
        for job in jobs:
            job.succeed(timeout_s=240)
    finally:
        for job in jobs:
            job.signal(signal.SIGKILL)
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder / "step-00000002")
    checkpoint.verify()
    return {f"{n}|{state}": t for state in STATES for n, t in checkpoint.tensors(state).items()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_one_world_and_stage_wrote_every_other_keeps_bit_for_bit(
    matrix: Path, world: int, stage: int, precision: str
) -> None:
    source = name(world, stage, precision)
    written = tensors(matrix / "written" / source)
    assert all(t.abs().sum() > 0 for key, t in written.items() if "word_embeddings" in key), "moments must have moved"
    crossings = sorted((matrix / "crossed").glob(f"{source}-to-*"))
    assert len(crossings) == len(WORLDS) * len(STAGES)
    for crossing in crossings:
        found = tensors(crossing)
        assert found.keys() == written.keys()
        different = [key for key in written if not torch.equal(found[key], written[key])]
        assert not different, (crossing.name, different[:3])


def test_no_two_sources_are_the_same(matrix: Path) -> None:
    sums = {
        (w, s, p): float(
            tensors(matrix / "written" / name(w, s, p))["bert.embeddings.word_embeddings.weight|fp32"].double().sum()
        )
        for w in WORLDS
        for s in STAGES
        for p in PRECISIONS
    }
    assert len(set(sums.values())) == len(sums), "equal sources would make the matrix prove nothing"
