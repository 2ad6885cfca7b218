"""An end travels between ranks as it is, and becomes the right exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.base.errors import CheckpointError, DstrainError, ExitCode, RunInUseError
from dstrain.checkpoint.outcome import Published, SaveOutcome

PUBLISHED = Published(7, Path("run/checkpoints/step-00000007"), 1000, True, {"copy": 0.1, "total": 2.0})


@pytest.mark.parametrize(
    "outcome",
    [
        SaveOutcome(7, PUBLISHED),
        SaveOutcome(7, error="disk", exit_code=76),
        SaveOutcome(7, own_part=True, first_seen=False),
    ],
)
def test_json_and_back_is_the_same(outcome: SaveOutcome) -> None:
    assert SaveOutcome.from_plain(json.loads(json.dumps(outcome.to_plain()))) == outcome
    assert outcome.failed == bool(outcome.error)


@pytest.mark.parametrize(
    ("code", "kind"), [(ExitCode.RETRY_HERE, CheckpointError), (ExitCode.RUN_IN_USE, RunInUseError)]
)
def test_a_lost_run_is_another_fault_than_a_lost_save(code: ExitCode, kind: type[DstrainError]) -> None:
    fault = SaveOutcome(7, error="why", exit_code=int(code)).fault()
    assert type(fault) is kind
    assert str(fault) == "why"
