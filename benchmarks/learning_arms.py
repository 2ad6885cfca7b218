"""The runs of `learning.py`: each switch as the sections it adds to the baseline's configuration, and the arithmetic of a run.

    baseline   AdamW, warm-up, stable, decay; masking, moments, decay and clipping are dstrain's defaults
    a switch   the same run with what its arm says: same rows, tokens and held-out rows

Arithmetic is counted by dstrain's own formula from the sizes (`dstrain.monitor.flops`) and from what the configuration says is
left out; norms, softmax and AdamW itself are not counted. Starts nothing.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from dstrain.base.config import merge
from dstrain.models.layer_dropping import LayerDroppingConfig, kept_layers
from dstrain.models.token_dropping import TokenDroppingConfig, share_at
from dstrain.monitor.flops import ModelShape, flops_per_token
from dstrain.objectives.mask_rate import rate_at

BASELINE = "adamw, wsd"
MASK_RATE = 0.3
HEAD_WIDTH = 32
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Size:
    """Of the encoder and of a full run."""

    hidden: int
    layers: int
    vocab: int
    row_length: int
    rows: int
    """Of one step."""
    steps: int
    held_out_rows: int

    @property
    def tokens(self) -> int:
        """Of a full run, padding included."""
        return self.steps * self.rows * self.row_length

    def half(self) -> Size:
        """The encoder that a larger one is grown from: half as wide, deep and long in training."""
        return Size(
            max(HEAD_WIDTH, self.hidden // 2), max(1, self.layers // 2), self.vocab, self.row_length, self.rows,
            max(1, self.steps // 2), self.held_out_rows,
        )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One switch."""

    name: str
    sections: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    """Peak rates to choose from; empty: `factors` times the baseline's best."""
    factors: tuple[float, ...] = (1.0,)
    grown: bool = False
    """Begins from a smaller encoder."""
    average: int = 0
    """Also score the mean of so many checkpoints."""

    @property
    def is_swept(self) -> bool:
        """Whether its rates are its own and may be widened."""
        return bool(self.rates)


def arms(size: Size) -> list[Arm]:
    """The baseline first."""
    steps, tokens = size.steps, size.tokens
    adam = (2e-3, 4e-3, 8e-3)
    both = (1.0, 2.0)
    slow = {"phases": [{"from_tokens": tokens // 4, "global_batch": size.rows}]}
    return [
        Arm(BASELINE, rates=adam),
        Arm("muon", {"optimizer": {"kind": "muon"}}, rates=adam),
        Arm("stable_adamw, no clipping", {"optimizer": {"kind": "stable_adamw", "clip_norm": 0.0}}, rates=adam),
        Arm("lamb", {"optimizer": {"kind": "lamb"}}, rates=(1e-2, 2e-2, 4e-2)),
        Arm("wsd, 1 - sqrt", {"schedule": {"kind": "wsd", "decay_shape": "one_minus_sqrt"}}),
        Arm("wsd, decay 40 %", {"schedule": {"kind": "wsd", "decay_steps": round(0.4 * steps)}}),
        Arm("linear", {"schedule": {"kind": "linear"}}, factors=both),
        Arm("cosine", {"schedule": {"kind": "cosine"}}, factors=both),
        Arm("inverse_sqrt", {"schedule": {"kind": "inverse_sqrt"}}, factors=both),
        Arm("half the batch for a quarter", {"train": {"global_batch": size.rows // 2, "max_steps": steps + steps // 4}, "data": slow}),
        Arm("short segments first", {"data": {"segment_warmup": {"first_length": max(8, size.row_length // 4), "until_tokens": tokens * 3 // 10}}}),
        Arm("masking 0.3 to 0.15", {"objective": {"mask_rate_final": MASK_RATE / 2, "mask_rate_steps": steps}}),
        Arm("token dropping", {"token_dropping": {"first_share": 0.5, "steps": max(1, round(0.7 * steps))}}),
        Arm("layer dropping", {"layer_dropping": {"last_keep": 0.5, "gamma": 100 / steps}}),
        Arm("grown from a half", grown=True),
        Arm("constant rate, mean of 4", {"schedule": {"kind": "constant"}, "checkpoint": {"every_steps": max(1, steps // 20), "keep_last": 4}}, average=4),
    ]  # fmt: skip


def settings(size: Size, arm: Arm, *, rate: float, seed: int) -> dict[str, Any]:
    """The configuration of a run, without its folders."""
    base: dict[str, Any] = {
        "seed": seed,
        "data": {"sequence_length": size.row_length, "lanes": max(1, size.rows // 2)},
        "model": {"config": _architecture(size)},
        "objective": {"mask_rate": MASK_RATE},
        "optimizer": {"learning_rate": rate},
        "schedule": {"kind": "wsd"},
        "engine": {"precision": "fp32", "device": "cpu", "threads": 1, "zero_stage": 0},
        "train": {
            "global_batch": size.rows, "micro_batch": size.rows, "max_steps": size.steps, "evaluate_rows": size.held_out_rows,
            "guards": {"loss_spike": "ignore"},  # a run that rolls back has seen other data than the others
        },
        "checkpoint": {"every_steps": None},
        "monitor": {"log_every": max(1, size.steps // 4), "tensorboard": False},
        "watchdog": {"enabled": False},
        "start": {"disk": False, "network": False, "clock": False, "shared_folder": False},
    }  # fmt: skip
    return merge(base, arm.sections)


def _architecture(size: Size) -> dict[str, Any]:
    return {
        "model_type": "modernbert", "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.hidden // HEAD_WIDTH), "intermediate_size": 2 * size.hidden,
        "max_position_embeddings": size.row_length, "global_attn_every_n_layers": 1,
        "initializer_range": 0.05,  # 0.02 is for wide models
    }  # fmt: skip


def training_flops(size: Size, arm: Arm, *, seed: int) -> float:
    """Of a whole run; a grown encoder pays for the smaller one too."""
    layers = _layer_shares(size, arm, seed)
    scored = _scored_share(size, arm)
    head = _per_token(size, layers=0, scored=scored)
    # A layer that sees a share s of the tokens has s of the products and s² of the attention.
    body = sum(
        s * _per_token(size, layers=1, scored=0.0, context=size.row_length * s) for shares in layers for s in shares
    ) / len(layers)
    total = size.tokens * (head + body)
    if arm.sections.get("optimizer", {}).get("kind") == "muon":
        total += size.steps * size.layers * _orthogonalising(size.hidden)
    if arm.grown:
        total += training_flops(size.half(), Arm("half"), seed=seed)
    return total


def _layer_shares(size: Size, arm: Arm, seed: int) -> list[list[float]]:
    """Share of the tokens that each layer sees, at each step."""
    tokens, layers = arm.sections.get("token_dropping"), arm.sections.get("layer_dropping")
    every = [[1.0] * size.layers for _ in range(size.steps)]
    for step, shares in enumerate(every):
        if tokens is not None:
            config = TokenDroppingConfig(**tokens)
            middle = range(config.full_first, size.layers - config.full_last)
            shares[:] = [share_at(config, step) if n in middle else 1.0 for n in range(size.layers)]
        if layers is not None:
            kept = kept_layers(LayerDroppingConfig(**layers), seed=seed, step=step, num_layers=size.layers)
            shares[:] = [s if k is not None else 0.0 for s, k in zip(shares, kept)]
    return every


def _scored_share(size: Size, arm: Arm) -> float:
    some = arm.sections.get("objective", {})
    last, steps = some.get("mask_rate_final"), some.get("mask_rate_steps")
    return statistics.fmean(
        rate_at(step, first=MASK_RATE, last=last, steps=steps, shape="linear") for step in range(size.steps)
    )


def _per_token(size: Size, *, layers: int, scored: float, context: float = 0.0) -> float:
    shape = ModelShape(layers, size.hidden, 2 * size.hidden, size.vocab, gated=True)
    return flops_per_token(shape, mean_context=context, scored_share=scored)


def _orthogonalising(hidden: int) -> float:
    """Of one layer's matrices, in one step: query-key-value in three, the output, the fused gate and value, the way back."""
    shapes = [(hidden, hidden)] * 4 + [(hidden, 4 * hidden), (hidden, 2 * hidden)]
    return sum(NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3) for m, n in shapes)
