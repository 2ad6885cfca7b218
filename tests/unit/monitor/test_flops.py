import pytest

from dstrain.monitor.flops import (
    ModelShape,
    Passage,
    PassageSum,
    flops_per_token,
    known_peak_tflops,
    model_flops_utilisation,
)

BERT_BASE = ModelShape(layers=12, hidden=768, intermediate=3072, vocab=30522)
BERT_LARGE = ModelShape(layers=24, hidden=1024, intermediate=4096, vocab=30522)
MOSAIC_BASE = ModelShape(layers=12, hidden=768, intermediate=3072, vocab=30528, gated=True)
MODERN_BASE = ModelShape(layers=22, hidden=768, intermediate=1152, vocab=50368, gated=True)
MODERN_LARGE = ModelShape(layers=28, hidden=1024, intermediate=2624, vocab=50368, gated=True)
ESM2_650M = ModelShape(layers=33, hidden=1280, intermediate=5120, vocab=33)


def windowed(layers: int, global_layers: int, length: int, window: int) -> float:
    return (global_layers * length + (layers - global_layers) * window) / layers


@pytest.mark.parametrize(
    ("shape", "mean_context", "scored_share", "giga"),
    [
        (BERT_BASE, 512, 0.15, 0.588),
        (BERT_LARGE, 512, 0.15, 1.992),
        (MOSAIC_BASE, 128, 0.30, 0.737),
        (MODERN_BASE, windowed(22, 8, 1024, 128), 0.30, 0.824),
        (MODERN_LARGE, windowed(28, 10, 1024, 128), 0.30, 2.31),
        (ESM2_650M, 1024, 0.15, 4.41),
    ],
)
def test_flops_match_the_derived_values_of_known_encoders(shape, mean_context, scored_share, giga):
    flops = flops_per_token(shape, mean_context=mean_context, scored_share=scored_share)
    assert flops / 1e9 == pytest.approx(giga, abs=0.005 if giga > 2 else 0.0006)


def test_a_dense_head_costs_more_than_a_sparse_one_by_exactly_the_unscored_share():
    dense = flops_per_token(BERT_BASE, mean_context=128, scored_share=1.0)
    sparse = flops_per_token(BERT_BASE, mean_context=128, scored_share=0.15)
    assert dense - sparse == pytest.approx(6 * 0.85 * (768**2 + 768 * 30522))


def test_layers_that_a_token_passes_by_are_not_counted_and_the_head_is():
    def flops(**left):
        return flops_per_token(BERT_BASE, mean_context=128, scored_share=0.15, **left)

    whole, head = flops(), flops(layer_share=0.0)
    assert head == pytest.approx(6 * 0.15 * (768**2 + 768 * 30522))
    assert flops(layer_share=0.25) - head == pytest.approx((whole - head) / 4)


def test_passages_are_averaged_over_tokens_and_contexts_over_what_was_gone_through():
    total = PassageSum()
    total.add(300, Passage(1.0, 100.0))
    total.add(100, Passage(0.5, 40.0))
    assert total.mean == Passage(350 / 400, (300 * 100 + 50 * 40) / 350)
    assert PassageSum().mean == Passage(0.0, 0.0)


def test_utilisation_of_the_published_modernbert_run():
    # 307 k tokens/s on one H100 at 0.824 GFLOP/token is 25.6 % of peak.
    mfu = model_flops_utilisation(tokens_per_second=307e3, flops_per_token=0.824e9, peak_tflops=989, num_devices=1)
    assert mfu == pytest.approx(0.256, abs=0.001)


def test_utilisation_halves_when_the_same_tokens_take_twice_the_devices():
    one, two = (
        model_flops_utilisation(tokens_per_second=1e5, flops_per_token=1e9, peak_tflops=312, num_devices=n)
        for n in (1, 2)
    )
    assert one == 2 * two


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_only_devices_known_for_sure_have_a_peak(name, peak):
    assert known_peak_tflops(name) == peak
