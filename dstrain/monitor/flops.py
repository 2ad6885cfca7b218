"""How much arithmetic a token needs, and which share of the devices' peak a run turns into it. Pure functions.

Counts useful work only: real tokens, the vocabulary head only where something is scored, nothing recomputed.
Dropout, norms, softmax and embedding look-ups are left out (under 1 % at encoder widths).
"""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 peak, TFLOP/s, without sparsity. Sources: NVIDIA A100 data sheet (312); H100 data sheet, SXM column (989,
# given as 1 979 with sparsity); H200 data sheet, SXM column (989, the same chip); HGX B200 data sheet (2 250, given as
# 36 PFLOP/s with sparsity for 8). Names are what torch.cuda.get_device_name says. PCIe and NVL boards of the H100 and
# H200 clock lower and are not listed.
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
_SLOWER_BOARDS = {"H100": ("PCIE", "NVL"), "H200": ("NVL",)}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of an encoder that decide its arithmetic."""

    layers: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Inner width of the feed-forward part."""
    vocab: int
    """Classes of the head: the vocabulary for masked tokens, the labels for fine-tuning."""
    gated: bool = False
    """Whether the feed-forward part has three matrices (GLU) instead of two."""


@dataclass(frozen=True)
class Passage:
    """A token's way through the layers, on average, at some step."""

    layer_share: float = 1.0
    """Of the layers, those that it really goes through: below 1 with token or layer dropping."""
    mean_context: float = 0.0
    """Tokens it attends to in these; 0 leaves attention out of the count."""


@dataclass
class PassageSum:
    """Averages passages over tokens."""

    tokens: int = 0
    layer_tokens: float = 0.0
    """Tokens times the share of the layers that they went through."""
    attended: float = 0.0
    """And times what they attended to there."""

    def add(self, tokens: int, passage: Passage) -> None:
        """Count tokens that went this way."""
        self.tokens += tokens
        self.layer_tokens += tokens * passage.layer_share
        self.attended += tokens * passage.layer_share * passage.mean_context

    @property
    def mean(self) -> Passage:
        """Of a token."""
        if not self.layer_tokens:
            return Passage(0.0, 0.0)
        return Passage(self.layer_tokens / self.tokens, self.attended / self.layer_tokens)


def flops_per_token(shape: ModelShape, *, mean_context: float, scored_share: float, layer_share: float = 1.0) -> float:
    """Floating point operations of forward and backward for one real token.

    Args:
        shape: the model's sizes.
        mean_context: tokens a token attends to, averaged over tokens and layers: the sum of squared document lengths
            over the sum of lengths, or the window where a layer has one.
        scored_share: scored targets per real token (the mask rate, or examples per token); the head runs only there.
        layer_share: of the layers, those that a token goes through.

    Returns:
        FLOP (not GFLOP); a multiply-add is two. BERT-base at 512 tokens and 15 % masking: 0.588e9.
    """
    matrices = 3 if shape.gated else 2
    layers = shape.layers * layer_share
    body = 6 * layers * (4 * shape.hidden**2 + matrices * shape.hidden * shape.intermediate)
    attention = 12 * layers * shape.hidden * mean_context
    head = 6 * scored_share * (shape.hidden**2 + shape.hidden * shape.vocab)
    return body + attention + head


def model_flops_utilisation(
    *, tokens_per_second: float, flops_per_token: float, peak_tflops: float, num_devices: int
) -> float:
    """The share of the devices' peak that went into useful arithmetic, from 0 to 1.

    Args:
        tokens_per_second: real tokens of all devices together.
        flops_per_token: from the function of that name.
        peak_tflops: dense peak of one device, TFLOP/s.
        num_devices: how many devices work.
    """
    return tokens_per_second * flops_per_token / (peak_tflops * 1e12 * num_devices)


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, TFLOP/s, or None where it is not known for sure."""
    name = device_name.upper()
    for board, peak in _PEAK_TFLOPS.items():
        if board in name and not any(variant in name for variant in _SLOWER_BOARDS.get(board, ())):
            return peak
    return None
