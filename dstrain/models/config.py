"""What a model is in a run's configuration, and the facts a built model tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from dstrain.base.config import Config
from dstrain.models.attention_kernels import KernelChoice

DSTRAIN_ENCODER_TYPE = "modernbert"
"""transformers' name of the architecture that `kind: dstrain-encoder` runs."""


class ModelConfig(Config):
    """An encoder, built from scratch or from existing weights."""

    kind: Literal["huggingface", "dstrain-encoder"] = "huggingface"
    """huggingface runs transformers' own code of any family. dstrain-encoder runs ModernBERT's architecture by dstrain's code,
    unpadded from end to end; `config` takes the fields of ModernBertConfig, checkpoints and exports are ModernBERT's."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The fields of its transformers configuration, `model_type` among them: bert, roberta, electra, distilbert, albert,
    modernbert, deberta-v2 and every other type that has a ...ForMaskedLM class. `vocab_size` follows the tokenizer."""
    init_from: str | None = None
    """A run folder, a checkpoint folder or a Hugging Face folder to take weights (and, where `config` is empty, the
    architecture) from. None starts from random weights."""
    init_from_smaller: str | None = None
    """A smaller encoder of the same model_type (a folder as for init_from) to grow this one from: its matrices lie in the middle
    of the larger ones and wrap around, its layers are repeated (arXiv 2412.13663). Of pretraining; same tokenizer."""
    attention: Literal["auto", "unpadded", "padded"] = "auto"
    """unpadded: one flat row, attention inside documents only, nothing computed on padding. padded: one padded row per
    document, for models outside transformers' attention interface. auto: unpadded where a self-check proves it equal."""
    attention_kernel: KernelChoice = "auto"
    """What attends inside documents when unpadded: varlen (torch's flash attention), flash-attn (where installed), flex
    (FlexAttention), sdpa (documents of equal length together; the only one on a CPU). auto: the first that can serve."""
    pad_vocab_to: int = Field(default=8, ge=1)
    """Round the embedding up to a multiple of this; 64 suits GPU matrix kernels, 1 keeps the tokenizer's size exactly."""

    @model_validator(mode="after")
    def _something(self) -> ModelConfig:
        if self.init_from is not None and self.init_from_smaller is not None:
            raise ValueError("give init_from for the same sizes, or init_from_smaller for larger ones, and not both")
        if self.kind == "dstrain-encoder":
            if self.attention == "padded":
                raise ValueError("attention: padded belongs to kind: huggingface; dstrain-encoder is always unpadded")
            if self.config.get("model_type", DSTRAIN_ENCODER_TYPE) != DSTRAIN_ENCODER_TYPE:
                raise ValueError(
                    f"kind: dstrain-encoder has the architecture {DSTRAIN_ENCODER_TYPE}, not "
                    f"{self.config['model_type']!r}; use kind: huggingface for others"
                )
            return self
        if not self.config and self.init_from is None:
            raise ValueError(
                "give config.model_type (and its sizes) for a model from scratch, or init_from for an existing one"
            )
        if self.config and "model_type" not in self.config and self.init_from is None:
            raise ValueError("config.model_type is missing: for example bert, roberta, modernbert")
        return self


@dataclass(frozen=True)
class ModelFacts:
    """What other rooms need to know about a built model."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    gated: bool
    """Whether the feed-forward has a third matrix (GLU)."""
    max_positions: int | None
    """Longest segment the position embeddings allow; None where positions are relative."""
    attention: str
    """unpadded or padded, as chosen."""
    attention_reason: str
    """Why, in words."""
