"""How many tokens a second a GPU takes from the loader: an estimate from its peak and the model's arithmetic, nothing measured.

The share of the peak is set at what the best encoder runs reach (H100, BERT-base at 512 tokens, packed: bound 40 %,
MLPerf's BERT-large 48 % with FP8), so that a loader that keeps up with this keeps up with what is really there.
"""

from __future__ import annotations

from dstrain.base.errors import ConfigError
from dstrain.monitor.flops import ModelShape, flops_per_token, known_peak_tflops

PEAK_SHARE = 0.45
"""Useful FLOP over dense bf16 peak, on the safe side."""

MODELS = {
    "bert-base": ModelShape(layers=12, hidden=768, intermediate=3072, vocab=30522),
    "bert-large": ModelShape(layers=24, hidden=1024, intermediate=4096, vocab=30522),
    "modernbert-base": ModelShape(layers=22, hidden=768, intermediate=1152, vocab=50368, gated=True),
    "modernbert-large": ModelShape(layers=28, hidden=1024, intermediate=2624, vocab=50368, gated=True),
}
GPUS = ("a100", "h100", "h200", "b200")


def tokens_per_second(gpu: str, model: str, *, mean_context: float, mask_rate: float = 0.3) -> float:
    """Real tokens a second one GPU would take at most, estimated.

    Args:
        gpu: one of `GPUS`.
        model: one of `MODELS`.
        mean_context: tokens a token attends to on average; for packed documents far below the sequence
            length, and the smaller, the more tokens a GPU takes.
        mask_rate: share of tokens that are scored.

    Raises:
        ConfigError: an unknown GPU or model; give the need as a number instead.
    """
    peak = known_peak_tflops(gpu.upper()) if gpu.lower() in GPUS else None
    shape = MODELS.get(model.lower())
    if peak is None or shape is None:
        known = f"GPUs {', '.join(GPUS)}; models {', '.join(MODELS)}"
        raise ConfigError(f"--gpu {gpu} --model {model}: not in the table ({known}); give --need-mtok-s instead")
    flops = flops_per_token(shape, mean_context=mean_context, scored_share=mask_rate)
    return PEAK_SHARE * peak * 1e12 / flops
