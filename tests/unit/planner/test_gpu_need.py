"""The estimate is the plan's, stays near what is published, and is never below what a GPU really takes."""

from __future__ import annotations

import pytest

from dstrain.base.errors import ConfigError
from dstrain.planner.gpu_need import MODELS, tokens_per_second

# Measured and published tokens/s of one GPU: ModernBERT-base on H100 307 k (ModernBERT#236), MPT-125M on A100 165.7 k
# (llm-foundry), BERT-large in MLPerf v3.0 on H100 246.6 k with FP8 at its own 1.94 GFLOP a token.
PUBLISHED = {("h100", "modernbert-base"): 307e3, ("a100", "bert-base"): 165.7e3}


@pytest.mark.parametrize(("gpu", "model"), PUBLISHED)
def test_the_estimate_is_above_published_runs_but_not_by_far(gpu: str, model: str) -> None:
    estimated = tokens_per_second(gpu, model, mean_context=512)
    assert PUBLISHED[gpu, model] < estimated < 2.5 * PUBLISHED[gpu, model]


@pytest.mark.parametrize("model", MODELS)
def test_a_larger_gpu_takes_more_and_shorter_contexts_do_too(model: str) -> None:
    rates = [tokens_per_second(gpu, model, mean_context=256) for gpu in ("a100", "h100", "h200", "b200")]
    assert rates == sorted(rates)
    assert tokens_per_second("h100", model, mean_context=64) > tokens_per_second("h100", model, mean_context=4096)


@pytest.mark.parametrize(("gpu", "model"), [("rtx", "bert-base"), ("h100", "gpt")])
def test_what_is_not_in_the_table_is_refused_with_the_way_out(gpu: str, model: str) -> None:
    with pytest.raises(ConfigError, match="--need-mtok-s"):
        tokens_per_second(gpu, model, mean_context=1)
