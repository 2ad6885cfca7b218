"""Hugging Face encoders fed flat micro-batches: unpadded where transformers' attention interface allows it, else padded.

Unpadded models run on one row of back-to-back segments; models outside that interface get one padded row per segment, and
say why. Positions restart at each segment, no token sees another segment, and the vocabulary head runs on the targets
only: a forward hook on the base model replaces its last hidden state by the rows to be scored, and the model's own head
does the rest. Does not build or load models and does not compute losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import HeadLoss, MicroBatch
from dstrain.models.attention import SegmentLayout, segment_attention
from dstrain.models.decoder import ScoringDecoder
from dstrain.models.inputs import pad_segments, padded_inputs, padded_rows, plain_batch, unpadded_inputs

ATTENTION_NAME = "dstrain_segments"
_SELF_CHECK_TOLERANCE = 1e-4


class MaskedLanguageModel(nn.Module):
    """A Hugging Face masked-LM model: a micro-batch in, (M, vocab) logits at its targets out, or their loss."""

    def __init__(self, model: PreTrainedModel, *, attention: str = "auto") -> None:
        """Wrap a model and choose how it is fed.

        Args:
            model: a `...ForMaskedLM`.
            attention: auto, unpadded or padded.

        Raises:
            ConfigError: unpadded is asked for and the model cannot.
        """
        super().__init__()
        self.model = model
        self.kernel = "sdpa"
        self._rows: Tensor | None = None
        model.base_model.register_forward_hook(self._keep_target_rows, with_kwargs=False)
        self.attention, self.attention_reason = choose_attention(self, attention, segments_are_targets=False)
        self._decoder = ScoringDecoder.of(model)
        self.scores_at_head = self._decoder is not None

    def forward(self, batch: MicroBatch, head_loss: HeadLoss | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (M, vocab) at `batch.targets`; or what `head_loss` makes of the states that would become logits."""
        if self.attention == "unpadded":
            inputs = unpadded_inputs(self.model, batch, kernel=self.kernel)
            self._rows = batch.targets
        else:
            inputs, width = padded_inputs(batch, pad_id=_pad_id(self.model))
            self._rows = padded_rows(batch, width)
        try:
            if head_loss is None or self._decoder is None:
                return cast(Tensor, self.model(**inputs).logits[0])
            with self._decoder.scoring(head_loss) as scored:
                loss = self.model(**inputs).logits
            return loss.reshape(()), scored.hits
        finally:
            self._rows = None

    def _keep_target_rows(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._rows is None:
            return output
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.reshape(1, -1, hidden.shape[-1])[:, self._rows]
        return output


class SequenceClassifier(nn.Module):
    """A Hugging Face sequence classifier: a micro-batch in, (M, classes) logits of its segments out.

    Unpadded, the encoder runs on one flat row; its hidden states are laid out as padded rows only for the pooler and the
    head, which read a row's first token or its mean.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = "auto") -> None:
        """Wrap a `...ForSequenceClassification`; see `MaskedLanguageModel` for the arguments."""
        super().__init__()
        self.model = model
        self.kernel = "sdpa"
        self._lengths: tuple[int, ...] | None = None
        model.base_model.register_forward_hook(self._lay_out_hidden)
        pooler = getattr(model.base_model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.register_forward_pre_hook(self._lay_out_pooler_input)
        self.attention, self.attention_reason = choose_attention(self, attention, segments_are_targets=True)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Logits (M, classes) of the segments `batch.targets`."""
        inputs, _ = padded_inputs(batch, pad_id=_pad_id(self.model))
        has_types = getattr(self.model.config, "type_vocab_size", 0) > 1
        types = batch.token_types if has_types else None
        if self.attention == "unpadded":
            flat = unpadded_inputs(self.model, batch, kernel=self.kernel, token_types=types)
            inputs = {**flat, "attention_mask": inputs["attention_mask"]}  # for a head that takes the mean of a row
            self._lengths = batch.lengths
        elif types is not None:
            inputs["token_type_ids"] = pad_segments(types, batch.lengths, 0)
        try:
            return cast(Tensor, self.model(**inputs).logits[batch.targets])
        finally:
            self._lengths = None

    def _lay_out_hidden(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._lengths is not None:
            output.last_hidden_state = pad_segments(output.last_hidden_state[0], self._lengths, 0)
        return output

    def _lay_out_pooler_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._lengths is None:
            return args
        return (pad_segments(args[0][0], self._lengths, 0), *args[1:])


Wrapped = MaskedLanguageModel | SequenceClassifier


def choose_attention(module: Wrapped, wanted: str, *, segments_are_targets: bool) -> tuple[str, str]:
    """Decide how a wrapped model is fed, and set its attention accordingly.

    Args:
        module: its `model` is set; its `attention` is tried out.
        wanted: auto, unpadded or padded.
        segments_are_targets: whether the logits belong to segments (classification) or to tokens.

    Returns:
        unpadded or padded, and why.

    Raises:
        ConfigError: unpadded is asked for and not possible.
    """
    if wanted == "padded":
        return "padded", "asked for"
    problem = _why_not_unpadded(module.model)
    if problem is None:
        module.attention = "unpadded"
        problem = _self_check(module, segments_are_targets=segments_are_targets)
    if problem is None:
        return "unpadded", "equal to one document at a time in the self-check"
    if wanted == "unpadded":
        raise ConfigError(f"model.attention: unpadded is not possible here: {problem}; use auto or padded")
    _use_attention(module.model, "sdpa" if getattr(module.model, "_supports_sdpa", False) else "eager")
    return "padded", problem


@torch.no_grad()
def _self_check(module: Wrapped, *, segments_are_targets: bool) -> str | None:
    """Compare three packed segments with the same segments one at a time; None when equal."""
    lengths = (7, 7, 4)
    vocab = module.model.config.vocab_size
    tokens = (torch.arange(sum(lengths)) * 7919 + 5) % max(vocab - 6, 1) + min(5, vocab - 1)
    try:
        together, apart = _packed_and_apart(module, tokens, lengths, segments_are_targets=segments_are_targets)
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
    ) as error:  # shapes that this model's own head did not expect
        return f"{type(module.model).__name__} does not take packed segments ({str(error).splitlines()[0][:80]})"
    difference = float((together - apart).abs().max())
    scale = max(1.0, float(together.abs().max()))
    if not difference <= _SELF_CHECK_TOLERANCE * scale:
        return f"packed and separate documents differ by {difference:.1e}"
    return None


def _packed_and_apart(
    module: Wrapped, tokens: Tensor, lengths: tuple[int, ...], *, segments_are_targets: bool
) -> tuple[Tensor, Tensor]:
    """Logits of all segments packed into one micro-batch, and of each in a micro-batch of its own."""
    with _evaluation(module.model):
        together = module(plain_batch(tokens, lengths, segments_are_targets=segments_are_targets))
        apart = [
            module(plain_batch(part, (len(part),), segments_are_targets=segments_are_targets))
            for part in torch.split(tokens, list(lengths))
        ]
    return together, torch.cat(apart)


def _pad_id(model: PreTrainedModel) -> int:
    return int(model.config.pad_token_id or 0)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, segments: SegmentLayout | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls: (1, h, T, d) in, (1, T, h, d) out."""
    if segments is None:
        raise ConfigError("dstrain's attention needs a packed micro-batch; export the model to use it elsewhere")
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    # transformers hands over the window as flash kernels count it: own position included, hence one less to each side.
    window = None if sliding_window is None else sliding_window - 1
    return segment_attention(query, key, value, segments, scale=scale, dropout=dropout, window=window), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _why_not_unpadded(model: PreTrainedModel) -> str | None:
    """Plug the segment attention in; None when transformers accepts it, else the reason it does not."""
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    return _use_attention(model, ATTENTION_NAME)


def _use_attention(model: PreTrainedModel, name: str) -> str | None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError) as error:
        return f"{type(model).__name__} refuses the attention implementation: {error}"
    return None
