"""How many tokens a second a GPU takes from the loader, by the plan's own roofline: forwards and backwards only.

The update and the communication between ranks are left out, so that a loader that keeps up with this keeps up with a run. The
models are those of the presets in `configs/`, by name; a run's own figure is better.
"""

from __future__ import annotations

from typing import Any

from dstrain.base.errors import ConfigError
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import anatomy_without_weights
from dstrain.planner.devices import DEVICES
from dstrain.planner.steptime import DSTRAIN_COMPILED, micro_batch_seconds
from dstrain.train.footprint import Batch

_TOKENS = 1 << 15
"""Of a micro-batch: enough that launches do not count."""


def _sizes(model_type: str, layers: int, hidden: int, intermediate: int) -> dict[str, Any]:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64,
        "intermediate_size": intermediate,
    }  # fmt: skip


MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "bert-base": (_sizes("bert", 12, 768, 3072), 30522),
    "bert-large": (_sizes("bert", 24, 1024, 4096), 30522),
    "modernbert-base": (_sizes("modernbert", 22, 768, 1152), 50368),
    "modernbert-large": (_sizes("modernbert", 28, 1024, 2624), 50368),
}
"""Architecture and vocabulary."""
GPUS = tuple(name for name, device in DEVICES.items() if device.is_gpu)


def tokens_per_second(gpu: str, model: str, *, mean_context: float, mask_rate: float = 0.3) -> float:
    """Real tokens a second that one GPU would take, estimated.

    Args:
        gpu: one of `GPUS`.
        model: one of `MODELS`.
        mean_context: tokens a token attends to on average; for packed documents far below the sequence
            length, and the smaller, the more tokens a GPU takes.
        mask_rate: share of tokens that are scored.

    Raises:
        ConfigError: an unknown GPU or model; give the need as a number instead.
    """
    if gpu.lower() not in GPUS or model.lower() not in MODELS:
        known = f"GPUs {', '.join(GPUS)}; models {', '.join(MODELS)}"
        raise ConfigError(f"--gpu {gpu} --model {model}: not in the table ({known}); give --need-mtok-s instead")
    architecture, vocabulary = MODELS[model.lower()]
    anatomy = anatomy_without_weights(ModelConfig(config=architecture), vocab_size=vocabulary)
    batch = Batch(_TOKENS, round(mask_rate * _TOKENS), mean_context)
    parts = micro_batch_seconds(anatomy, batch, DEVICES[gpu.lower()], precision="bf16", stack=DSTRAIN_COMPILED)
    return _TOKENS / sum(parts)
