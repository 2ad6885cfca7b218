"""A flat micro-batch as a model's forward arguments: one unpadded row, or one padded row per segment.

Knows the conventions of transformers' encoders (argument names, where position ids start), not the library itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.base.device import sent
from dstrain.base.protocols import MicroBatch
from dstrain.models.attention import segment_layout


def position_offset(model: Any) -> int:
    """Where position ids start: padding_idx + 1 for the RoBERTa family, else 0."""
    embeddings = getattr(model.base_model, "embeddings", None)
    if embeddings is not None and hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1
    return 0


def unpadded_inputs(
    model: Any, batch: MicroBatch, *, kernel: str = "sdpa", token_types: Tensor | None = None
) -> dict[str, Any]:
    """Forward arguments of one flat row; `segments` reaches the attention function through transformers' kwargs."""
    inputs: dict[str, Any] = {
        "input_ids": batch.tokens[None],
        "position_ids": batch.positions[None] + position_offset(model),
        "segments": segment_layout(batch.lengths, device=batch.tokens.device, kernel=kernel),
    }
    if token_types is not None:
        inputs["token_type_ids"] = token_types[None]
    return inputs


def padded_inputs(batch: MicroBatch, *, pad_id: int) -> tuple[dict[str, Any], int]:
    """Forward arguments of one padded row per segment, and the row width."""
    width = max(batch.lengths)
    lengths = sent(torch.tensor(batch.lengths), batch.tokens.device)
    mask = torch.arange(width, device=batch.tokens.device)[None] < lengths[:, None]
    return {"input_ids": pad_segments(batch.tokens, batch.lengths, pad_id), "attention_mask": mask.long()}, width


def pad_segments(flat: Tensor, lengths: tuple[int, ...], value: int) -> Tensor:
    """(T,) values of all segments as (N, longest) rows, filled up with `value`."""
    return nn.utils.rnn.pad_sequence(list(torch.split(flat, list(lengths))), batch_first=True, padding_value=value)


def padded_rows(batch: MicroBatch, width: int) -> Tensor:
    """Targets of the flat row as indices into the padded rows laid end to end."""
    segment = segment_numbers(batch.lengths, batch.tokens.device)
    return (segment * width + batch.positions)[batch.targets]


def segment_numbers(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(T,) number of each token's segment."""
    counts = sent(torch.tensor(lengths), device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))


def plain_batch(tokens: Tensor, lengths: tuple[int, ...], *, segments_are_targets: bool = False) -> MicroBatch:
    """A micro-batch of some segments in which every token, or every segment, is a target."""
    positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
    targets = torch.arange(len(lengths) if segments_are_targets else len(tokens), device=tokens.device)
    labels = targets if segments_are_targets else tokens
    return MicroBatch(tokens=tokens, positions=positions, lengths=lengths, targets=targets, labels=labels)
