"""One tiny model of every encoder family, micro-batches for them, and plain transformers' answer to compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dstrain.base.protocols import MicroBatch, StepData
from dstrain.models.config import ModelConfig
from dstrain.models.dstrain_encoder import DstrainMaskedLanguageModel
from dstrain.models.encoders import MaskedLanguageModel
from dstrain.models.huggingface import build_masked_lm

VOCABULARY = 61  # no multiple of 8: the embedding is padded to 64

_COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 66, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,  # large enough for attention and positions to show in the logits
}  # fmt: skip
UNPADDED: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "roberta": _COMMON,
    "electra": {**_COMMON, "embedding_size": 16},
    "distilbert": {
        "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 66, "dropout": 0.0,
        "attention_dropout": 0.0, "initializer_range": 0.2,
    },
    "albert": {**_COMMON, "embedding_size": 16},
    "modernbert": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 66, "local_attention": 8, "global_attn_every_n_layers": 2, "initializer_range": 0.2,
    },
}  # fmt: skip
PADDED: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        **_COMMON, "relative_attention": True, "position_buckets": 8, "max_relative_positions": -1,
        "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False,
    },
}  # fmt: skip
FAMILIES = {**UNPADDED, **PADDED}
SPECIAL = {"pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
LENGTHS = (23, 23, 17, 9, 2, 1)


def tiny_model(family: str, *, seed: int = 0, attention: str = "auto", **fields: Any) -> MaskedLanguageModel:
    """A model of a family with weights that are a function of the seed."""
    torch.manual_seed(seed)
    config = ModelConfig(
        config={"model_type": family, **FAMILIES[family], **fields},
        attention=attention,  # type: ignore[arg-type]
    )
    model = build_masked_lm(config, vocab_size=VOCABULARY, special=SPECIAL)
    assert isinstance(model, MaskedLanguageModel)
    return model


def tiny_encoder(*, seed: int = 0, **fields: Any) -> DstrainMaskedLanguageModel:
    """dstrain's own encoder, in the sizes and with the weights of `tiny_model("modernbert")`."""
    torch.manual_seed(seed)
    config = ModelConfig(kind="dstrain-encoder", config={**FAMILIES["modernbert"], **fields})
    model = build_masked_lm(config, vocab_size=VOCABULARY, special=SPECIAL)
    assert isinstance(model, DstrainMaskedLanguageModel)
    return model


def documents(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> list[Tensor]:
    """Random token ids, never a special one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator) for n in lengths]


def packed(texts: Sequence[Tensor], *, targets: Tensor | None = None, labels: Tensor | None = None) -> MicroBatch:
    """Documents back to back; every token is a target unless `targets` says which."""
    tokens = torch.cat(list(texts))
    chosen = torch.arange(len(tokens)) if targets is None else targets
    return MicroBatch(
        tokens=tokens,
        positions=torch.cat([torch.arange(len(text)) for text in texts]),
        lengths=tuple(len(text) for text in texts),
        targets=chosen,
        labels=tokens[chosen] if labels is None else labels,
        num_targets=len(chosen),
        num_tokens=len(tokens),
    )


def step_data(batches: Sequence[MicroBatch], *, ledger: int = 0) -> StepData:
    """A step of some micro-batches; every document counts as a row."""
    rows, tokens = sum(len(b.lengths) for b in batches), sum(b.num_tokens for b in batches)
    return StepData(list(batches), num_rows=rows, padded_tokens=tokens, ledger=ledger, epoch=0.0)


@torch.no_grad()
def plain_answer(model: MaskedLanguageModel, texts: Sequence[Tensor]) -> Tensor:
    """(T, vocab) logits of plain transformers, one document at a time, in a model of its own with the same weights."""
    plain = type(model.model)(copy.deepcopy(model.model.config))  # the attention's name is kept in the configuration
    plain.set_attn_implementation("eager")
    plain.load_state_dict(model.model.state_dict())
    plain.eval()
    return torch.cat(
        [plain(input_ids=text[None], attention_mask=torch.ones_like(text)[None]).logits[0] for text in texts]
    )
