"""Which parameters an optimizer treats alike: decayed or not, Muon's or AdamW's.

Weight decay acts on matrices and embeddings only: biases and normalisation weights (fewer than two dimensions) are left
alone, as in BERT and RoBERTa. Muon's are the matrices of the numbered layers; embeddings and heads stay AdamW's, as Jordan
does it (kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dstrain.optim.config import OptimizerConfig

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of trained parameters, each with its `rule`, the names of its `moments`, and whether LAMB adapts it.

    Order follows the model's; empty groups are left out.

    Args:
        module: the model.
        config: the optimizer section.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = hidden_matrices(module) if config.kind == "muon" else set()
    ordinary = [p for p in trained if p not in matrices]
    rule = "adamw" if config.kind == "muon" else config.kind
    adam: dict[str, Any] = {"rule": rule, "moments": ADAM_MOMENTS, "betas": config.betas, "eps": config.eps}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p in matrices], **_muon(config)},
        {"params": [p for p in ordinary if p.ndim >= 2], "weight_decay": config.weight_decay, "adapted": True, **adam},
        {"params": [p for p in ordinary if p.ndim < 2], "weight_decay": 0.0, "adapted": False, **adam},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """Weight matrices of numbered layers (`...layer.3.output.dense.weight`), without embeddings of any kind."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {
        p
        for name, p in module.named_parameters()
        if p.requires_grad and p.ndim == 2 and id(p) not in embeddings and any(x.isdigit() for x in name.split("."))
    }


def _muon(config: OptimizerConfig) -> dict[str, Any]:
    muon = config.muon
    return {
        "rule": "muon",
        "moments": MUON_MOMENTS,
        "lr_factor": 1.0 if muon.learning_rate is None else muon.learning_rate / config.learning_rate,
        "weight_decay": config.weight_decay if muon.weight_decay is None else muon.weight_decay,
        "momentum": muon.momentum,
        "nesterov": muon.nesterov,
        "newton_schulz_steps": muon.newton_schulz_steps,
        "scale": muon.scale,
        "split_qkv": muon.split_qkv,
    }
