"""dstrain's own encoder: ModernBERT's architecture (arXiv 2412.13663) on one flat row of tokens, with nothing in between.

Pre-norm, rotary positions, GeGLU, one matrix for query, key and value, local and global attention, no biases. It takes
over the weights and the names of a `ModernBertForMaskedLM`, so that a checkpoint of one is a checkpoint of the other and an
export is native. What differs is the way through it: (T, H) all along, rotations made once for all layers of a kind, and
nothing between the matrices but what a compiler can fuse.

Shapes: T tokens of all segments, H width, h heads of d. Does not compute losses; the objective's `HeadLoss` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dstrain.base.protocols import HeadLoss, MicroBatch
from dstrain.models.attention import SegmentLayout, segment_attention, segment_layout

Rotation = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + GeGLU(norm(x))."""

    def __init__(self, layer: Any, config: Any) -> None:
        """Take over a ModernBertEncoderLayer's modules under their own names."""
        super().__init__()
        self.attn_norm = layer.attn_norm
        self.attn = nn.ModuleDict({"Wqkv": layer.attn.Wqkv, "Wo": layer.attn.Wo})
        self.mlp_norm = layer.mlp_norm
        self.mlp = nn.ModuleDict({"Wi": layer.mlp.Wi, "Wo": layer.mlp.Wo})
        self.activation: nn.Module = layer.mlp.act
        self.kind: str = layer.attention_type
        self.window: int | None = config.sliding_window if self.kind == "sliding_attention" else None
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.attention_dropout = float(config.attention_dropout)
        self.mlp_dropout = float(config.mlp_dropout)

    def forward(self, x: Tensor, rotation: Rotation, layout: SegmentLayout) -> Tensor:
        """(T, H) to (T, H)."""
        query, key, value = self.before_attention(x, *rotation)
        attended = segment_attention(
            query, key, value, layout, scale=self.width**-0.5, window=self.window,
            dropout=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return self.after_attention(x, attended[0])

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, the merged projection and the rotation: three of (1, h, T, d)."""
        merged = self.attn["Wqkv"](self.attn_norm(x)).view(-1, 3, self.heads, self.width)
        query, key, value = (part.transpose(0, 1)[None] for part in merged.unbind(1))
        return rotated(query, cos, sin), rotated(key, cos, sin), value

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """(T, h, d) attended back into the stream, and the feed-forward part."""
        out = self.attn["Wo"](attended.reshape(x.shape))
        x = x + functional.dropout(out, self.attention_dropout, self.training)
        value, gate = self.mlp["Wi"](self.mlp_norm(x)).chunk(2, dim=-1)
        inner = functional.dropout(self.activation(value) * gate, self.mlp_dropout, self.training)
        return cast(Tensor, x + self.mlp["Wo"](inner))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on (1, h, T, d), halves paired as in transformers; computed in fp32.

    Args:
        x: queries or keys.
        cos: (T, d).
        sin: (T, d).
    """
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class DstrainEncoder(nn.Module):
    """Embeddings, blocks and vocabulary head, under the names of a `ModernBertForMaskedLM`."""

    def __init__(self, model: Any) -> None:
        """Take over the modules of a `ModernBertForMaskedLM`, which is of no use afterwards."""
        super().__init__()
        self.config = model.config
        body = model.model
        self.model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(
                    {"tok_embeddings": body.embeddings.tok_embeddings, "norm": body.embeddings.norm}
                ),
                "layers": nn.ModuleList(Block(layer, model.config) for layer in body.layers),
                "final_norm": body.final_norm,
            }
        )
        self.rotary = body.rotary_emb
        self.head = nn.ModuleDict({"dense": model.head.dense, "norm": model.head.norm})
        self.head_activation: nn.Module = model.head.act
        self.decoder: nn.Linear = model.decoder
        self._loss: HeadLoss | None = None
        self._hits = torch.zeros(())
        self.decoder.forward = self._decode

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return [cast(Block, layer) for layer in cast(nn.ModuleList, self.model["layers"])]

    def hidden_states(self, batch: MicroBatch, *, kernel: str = "sdpa") -> Tensor:
        """(T, H) after the last norm; `kernel` is a name of `attention_kernels`."""
        embeddings = cast(Mapping[str, nn.Module], self.model["embeddings"])
        x: Tensor = embeddings["norm"](embeddings["tok_embeddings"](batch.tokens))
        x = functional.dropout(x, float(self.config.embedding_dropout), self.training)
        layout = segment_layout(batch.lengths, device=x.device, kernel=kernel)
        rotations = {
            kind: tuple(part[0] for part in self.rotary(x, batch.positions[None], kind))
            for kind in sorted({block.kind for block in self.blocks})
        }
        for block in self.blocks:
            x = block(x, rotations[block.kind], layout)
        return cast(Tensor, self.model["final_norm"](x))

    def forward(
        self, batch: MicroBatch, head_loss: HeadLoss | None = None, *, kernel: str = "sdpa"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (M, vocab) at `batch.targets`; or what `head_loss` makes of the states that would become logits."""
        states = self.hidden_states(batch, kernel=kernel)[batch.targets]
        states = self.head["norm"](self.head_activation(self.head["dense"](states)))
        self._loss = head_loss
        try:
            result: Tensor = self.decoder(states)
        finally:
            self._loss = None
        return result if head_loss is None else (result, self._hits)

    def _decode(self, input: Tensor) -> Tensor:
        """The decoder's forward, so that ZeRO stage 3 has its weights gathered while the loss is computed."""
        if self._loss is None:
            return functional.linear(input, self.decoder.weight, self.decoder.bias)
        loss, self._hits = self._loss(input, self.decoder.weight, self.decoder.bias)
        return loss


class DstrainMaskedLanguageModel(nn.Module):
    """dstrain's encoder as the stages know a masked-LM model: always unpadded, scored in its head."""

    attention = "unpadded"
    attention_reason = "dstrain's own encoder"
    scores_at_head = True

    def __init__(self, model: Any) -> None:
        """Wrap a `ModernBertForMaskedLM`, whose weights it takes over."""
        super().__init__()
        self.kernel = "sdpa"
        self.model = DstrainEncoder(model)

    def forward(self, batch: MicroBatch, head_loss: HeadLoss | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """See `DstrainEncoder.forward`."""
        return cast("Tensor | tuple[Tensor, Tensor]", self.model(batch, head_loss, kernel=self.kernel))
