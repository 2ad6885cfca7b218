import dataclasses
import json

import pytest
import torch

from dstrain.base.protocols import IGNORED_LABEL, MicroBatch, RunState


def micro_batch(**changes):
    fields = dict(
        tokens=torch.arange(3), positions=torch.arange(3), lengths=(3,), targets=torch.tensor([1]),
        labels=torch.tensor([7]), num_targets=1, num_tokens=3,
    )  # fmt: skip
    return MicroBatch(**(fields | changes))


def test_a_micro_batch_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        micro_batch().num_targets = 2


def test_ignored_labels_are_torchs():
    logits = torch.randn(1, 4)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([IGNORED_LABEL]), reduction="sum")
    assert loss.item() == 0.0


def test_the_counters_of_a_run_survive_json():
    state = RunState(step=3, rows=2**40, tokens=2**50, ledger=2**63 - 1, compute_seconds=1.5, best_metric=0.25)
    assert RunState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state
