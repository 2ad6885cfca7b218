"""The end of a fine-tuning run, on ranks that are threads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.errors import PeerError, StorageError
from dstrain.stages import finetune
from dstrain.stages.finetune import METRICS_FILE, Scoring
from tests.support.simulated_ranks import run_threads


class Examples:
    has_labels = False

    def __len__(self) -> int:
        return 3


def test_predictions_that_cannot_be_written_end_all_ranks_with_the_fault_of_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise StorageError(f"{path}: no space left")

    monkeypatch.setattr(finetune, "write_predictions", full)
    monkeypatch.setattr(Scoring, "outputs", lambda *_: np.zeros((3, 2), dtype=np.float32))

    def finish(control: ControlPlane) -> None:
        scoring = Scoring.__new__(Scoring)
        scoring._config = SimpleNamespace(run_folder=tmp_path, task=SimpleNamespace(chosen_metric="accuracy"))
        scoring._world, scoring._splits = control.world, {"validation": Examples()}
        scoring._task = SimpleNamespace(labels=("a", "b"))
        scoring.finish(SimpleNamespace(control=control))

    first, second = run_threads(2, finish)
    assert isinstance(first, StorageError)
    assert isinstance(second, PeerError)
    assert (second.exit_code, str(second)) == (76, f"rank 0: {first}")
    assert not (tmp_path / METRICS_FILE).exists()
