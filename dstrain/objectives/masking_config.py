"""Settings of masking. No arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.objectives.mask_rate import RateShape


class MaskingConfig(Config):
    """Which tokens are hidden, and behind what."""

    mask_rate: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of tokens to predict. 0.3 trains faster than BERT's 0.15 at equal quality (arXiv 2202.08005, MosaicBERT)."""
    mask_rate_final: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of tokens to predict at the end of a schedule, e.g. 0.15 after 0.3 (arXiv 2305.15096). Default: no schedule."""
    mask_rate_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps from mask_rate to mask_rate_final; the latter stays. Evaluation always uses mask_rate."""
    mask_rate_shape: RateShape = "linear"
    """The way between the two rates: linear, or cosine (half a wave, slow at both ends)."""
    mask_share: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of the chosen tokens shown as [MASK] (BERT's 80 %)."""
    random_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the chosen tokens shown as a random token (BERT's 10 %); the rest is shown unchanged."""
    whole_word: bool = False
    """Choose words instead of tokens: all tokens of a word share one choice. With `spans`, spans are of whole words."""
    spans: bool = False
    """Choose runs of tokens (or words) of geometric lengths, as SpanBERT (arXiv 1907.10529); the share stays mask_rate."""
    span_p: float = Field(default=0.2, gt=0.0, lt=1.0)
    """p of the geometric law of span lengths: the larger, the shorter. SpanBERT's 0.2 has a mean of 3.8 up to length 10."""
    span_longest: int = Field(default=10, ge=1, le=64)
    """Longest span, in tokens or words; the law is cut there (SpanBERT's 10)."""
    replace: Literal["token", "unit"] = "token"
    """Who shares the lot of [MASK], random or unchanged: each token has its own (BERT), or a whole word or span has one (SpanBERT)."""

    @model_validator(mode="after")
    def _consistent(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1.0 + 1e-9:
            raise ValueError(
                f"mask_share={self.mask_share} and random_share={self.random_share} add up to more than 1; lower one of them"
            )
        if (self.mask_rate_final is None) != (self.mask_rate_steps is None):
            raise ValueError(
                f"mask_rate_final={self.mask_rate_final} and mask_rate_steps={self.mask_rate_steps}: "
                "a schedule needs both; set the other one too, or neither for a constant rate"
            )
        return self
