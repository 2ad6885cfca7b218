"""The objectives of the variants before the last savers: the same loss by other ways."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dstrain.base.storage import read_json, write_json
from dstrain.objectives.mlm import MlmObjective
from dstrain.planner.bench_variant import LogitsObjective
from dstrain.planner.variants import Job
from tests.support.runs import build_tiny_shards, pretrain_settings
from tests.support.tiny_models import documents, packed, tiny_model


@pytest.mark.parametrize("every_token", [True, False])
def test_logits_give_the_loss_and_gradients_of_the_head(every_token: bool) -> None:
    model = tiny_model("bert")
    batch = packed(documents(), targets=torch.arange(0, 60, 7))
    results = []
    for objective in (MlmObjective(), LogitsObjective(every_token=every_token)):
        parts = objective.loss(model, batch)
        parts.loss_sum.backward()
        results.append((parts, model.model.get_output_embeddings().weight.grad.clone()))
        model.zero_grad()
    (one, gradient), (other, other_gradient) = results
    torch.testing.assert_close(one.loss_sum, other.loss_sum)
    assert one.correct == other.correct
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-5)


def test_what_a_switch_leaves_out_of_the_layers_is_left_out_and_not_counted(tmp_path: Path) -> None:
    """Once the timed steps ran whole layers: the engine was not told what the stage leaves out."""
    shards, answers = build_tiny_shards(tmp_path), {}
    for name, switch in {"whole": {}, "dropping": {"token_dropping": {"first_share": 0.5, "steps": 1000}}}.items():
        settings = pretrain_settings(shards, tmp_path / "run", model={"config": {"num_hidden_layers": 4}}, **switch)
        job = Job(config=settings, head="inside", warmup=0, steps=2, limit_s=60.0, out=str(tmp_path / f"{name}.json"))
        write_json(tmp_path / "job.json", dataclasses.asdict(job))
        command = [sys.executable, "-m", "dstrain.planner.bench_variant", str(tmp_path / "job.json")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        answers[name] = read_json(Path(job.out))
    whole, dropping = answers["whole"], answers["dropping"]
    assert dropping["tokens"] == whole["tokens"]
    assert dropping["losses"] != whole["losses"]
    assert whole["passage"]["layer_share"] == 1.0
    assert dropping["passage"]["layer_share"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert dropping["passage"]["mean_context"] < whole["passage"]["mean_context"]
