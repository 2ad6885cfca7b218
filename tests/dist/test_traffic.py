"""The bytes that two processes really exchange in a step, at every ZeRO stage, against the planner's formulas: equal to the byte."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.models.anatomy import Anatomy
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import anatomy_without_weights
from dstrain.train import traffic
from dstrain.train.traffic import Sharding, step_collectives
from tests.support.runs import Job

pytestmark = pytest.mark.dist

VOCABULARY = 211


def shape(hidden: int, intermediate: int) -> dict[str, Any]:
    """Sizes that do not divide evenly, so that padding shows."""
    return {
        "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": intermediate, "max_position_embeddings": 31, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


SMALL, LARGE = shape(38, 75), shape(332, 637)  # every weight below stage 3's persistence threshold, and some above


def case(model: dict[str, Any], stage: int, precision: str, accumulation: int, **more: Any) -> dict[str, Any]:
    base = {"bucket": 50_000_000, "zero": {}}
    return {**base, "model": model, "stage": stage, "precision": precision, "accumulation": accumulation, **more}


AS_GENERATED = [case(SMALL, *c) for c in itertools.product(range(4), ("bf16", "fp32"), (1, 4))]
AS_GENERATED += [case(LARGE, 3, precision, accumulation) for precision in ("bf16", "fp32") for accumulation in (1, 4)]
AS_GENERATED += [case(SMALL, stage, "fp32", 4, bucket=5_000) for stage in (1, 2, 3)]
SINGLE_RANK_BUCKETS = [
    case(SMALL, stage, precision, accumulation, zero={"use_multi_rank_bucket_allreduce": False})
    for stage in (1, 2)
    for precision in ("bf16", "fp32")
    for accumulation in (1, 4)
]
NOTHING_LIVE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
REGATHERED = [case(LARGE, 3, "bf16", accumulation, zero=NOTHING_LIVE, bucket=100_000) for accumulation in (1, 4)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes of each kind of collective in a steady step, by case."""
    folder = tmp_path_factory.mktemp("traffic")
    cases = AS_GENERATED + SINGLE_RANK_BUCKETS + REGATHERED
    command = ["-m", "tests.support.traffic_worker", str(folder / "counted.json"), json.dumps(cases)]
    with Job(command, world_size=2, log_folder=folder / "logs") as job:
        job.succeed(timeout_s=280)
    found = json.loads((folder / "counted.json").read_text())
    return {key({name: entry[name] for name in cases[0]}): entry["sent"] for entry in found}


def key(one: dict[str, Any]) -> str:
    return json.dumps(one, sort_keys=True)


def anatomy(one: dict[str, Any]) -> Anatomy:
    return anatomy_without_weights(ModelConfig(config=one["model"], pad_vocab_to=1), vocab_size=VOCABULARY)


def planned(one: dict[str, Any]) -> dict[str, int]:
    sharding = Sharding(
        one["stage"], one["precision"], 2, one["accumulation"], one["bucket"],
        multi_rank_buckets=one["zero"].get("use_multi_rank_bucket_allreduce", True),
    )  # fmt: skip
    found: dict[str, int] = {}
    for collective in step_collectives(anatomy(one), sharding):
        found[collective.kind] = found.get(collective.kind, 0) + collective.num_bytes
    return found


def names(cases: list[dict[str, Any]]) -> list[str]:
    return [
        f"z{c['stage']}-{c['precision']}-g{c['accumulation']}-h{c['model']['hidden_size']}-b{c['bucket']}"
        for c in cases
    ]


@pytest.mark.parametrize("one", AS_GENERATED + SINGLE_RANK_BUCKETS, ids=names(AS_GENERATED + SINGLE_RANK_BUCKETS))
def test_a_step_sends_the_bytes_that_the_plan_says(counted: dict[str, dict[str, int]], one: dict[str, Any]) -> None:
    sent = {kind: size for kind, size in counted[key(one)].items() if kind != "agreement"}
    assert sent == planned(one)


@pytest.mark.parametrize("one", AS_GENERATED, ids=names(AS_GENERATED))
def test_agreements_of_a_step_are_a_few_hundred_bytes(counted: dict[str, dict[str, int]], one: dict[str, Any]) -> None:
    assert 0 < counted[key(one)]["agreement"] < 1000


@pytest.mark.parametrize("one", REGATHERED, ids=names(REGATHERED))
def test_weights_beyond_the_live_limit_are_gathered_again(
    counted: dict[str, dict[str, int]], one: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of nothing, every large weight is treated as those of models far beyond a billion parameters."""
    monkeypatch.setattr(traffic, "REUSE_ELEMENTS", 0)
    sent = {kind: size for kind, size in counted[key(one)].items() if kind != "agreement"}
    assert sent == planned(one)
