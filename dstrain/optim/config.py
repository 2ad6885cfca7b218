"""What an optimizer is in a run's configuration. No arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config

OptimizerKind = Literal["adamw", "stable_adamw", "lamb", "muon"]


class MuonConfig(Config):
    """Settings of Muon's matrices; all other parameters are AdamW's (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead along the momentum before orthogonalising."""
    newton_schulz_steps: int = Field(default=5, ge=1, le=20)
    """Iterations of the orthogonalisation; Jordan's 5."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of an update of r x c: match_rms_adamw is 0.2·√max(r, c), which has the root mean square of AdamW's updates, so that
    AdamW's rate and decay serve (arXiv 2502.16982); original is √max(1, r/c), which needs a rate of its own (about 0.02)."""
    learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak rate of the matrices. Default: optimizer.learning_rate. The schedule moves both alike."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Decoupled decay of the matrices. Default: optimizer.weight_decay."""
    split_qkv: bool = True
    """Orthogonalise query, key and value of a fused matrix (its name ends in qkv, its rows are 3 times its columns) apart."""

    @model_validator(mode="after")
    def _own_rate(self) -> MuonConfig:
        if self.scale == "original" and self.learning_rate is None:
            raise ValueError("scale: original needs learning_rate, the matrices' own peak rate (Jordan's: 0.02)")
        return self


class OptimizerConfig(Config):
    """The optimizer and its clipping."""

    kind: OptimizerKind = "adamw"
    """adamw; stable_adamw, which clips each parameter's update by its root mean square (arXiv 2304.13013); lamb, whose updates
    follow each parameter's norm, for batches of tens of thousands of rows (arXiv 1904.00962); muon, which orthogonalises the
    momentum of the layers' matrices (arXiv 2502.16982)."""
    learning_rate: float = Field(default=5e-4, gt=0.0)
    """Peak rate."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled decay of matrices and embeddings; biases and norms are never decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the moments; RoBERTa's 0.98 keeps large batches stable."""
    eps: float = Field(default=1e-6, gt=0.0)
    """Added to the denominator."""
    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 switches clipping off (stable_adamw is meant to do without)."""
    muon: MuonConfig = MuonConfig()
    """Of kind: muon."""

    @model_validator(mode="after")
    def _muon_is_for_muon(self) -> OptimizerConfig:
        if self.kind != "muon" and self.muon != MuonConfig():
            raise ValueError(f"muon belongs to kind: muon, not to kind: {self.kind}")
        return self
