"""What `dstrain bench` compares: a padded, dense, eager step, and the same step with one saver more at a time. Pure.

Each variant changes keys of the user's own configuration and, for the first ones, how the head is fed; nothing else differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dstrain.models.config import DSTRAIN_ENCODER_TYPE

Head = Literal["every-token", "targets", "inside"]


@dataclass(frozen=True)
class Variant:
    """One way to do the step."""

    name: str
    """A few words, as in a table."""
    what: str
    """One sentence."""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Keys of the configuration, over the user's."""
    changes_learning: bool = False
    """Whether the model that comes out is another one: such a variant is measured and never recommended."""
    head: Head = "inside"
    """every-token: logits of all tokens; targets: logits of the targets only; inside: no logits, the head scores in chunks."""


@dataclass(frozen=True)
class Job:
    """What is measured."""

    config: dict[str, Any]
    """A whole pretraining configuration, the variant's keys included."""
    head: Head
    warmup: int
    steps: int
    limit_s: float
    """No further timed step is begun after this; at least one is made."""
    out: str


def variants(*, model_type: str, compiles: bool, micro_batch: int) -> tuple[Variant, ...]:
    """The waterfall, each with all savers of those before it.

    Args:
        model_type: transformers' name of the architecture.
        compiles: whether blocks are compiled at the end (a minute each on most devices).
        micro_batch: rows of a forward, as configured; a last variant doubles it.
    """
    plain = {"engine": {"compile": "off"}}
    unpadded = {**plain, "model": {"attention": "auto", "kind": "huggingface"}}
    found = [
        Variant(
            "padded, dense head, eager", "a row for each document, padded to the longest; logits of every token",
            {**plain, "model": {"attention": "padded", "kind": "huggingface"}}, head="every-token",
        ),
        Variant("+ unpadded", "one flat row, attention inside documents only", unpadded, head="every-token"),
        Variant("+ sparse head", "logits of masked tokens only", unpadded, head="targets"),
        Variant("+ loss inside the head", "logits are never kept: a chunk at a time, gradients on the way", unpadded),
    ]  # fmt: skip
    last: dict[str, dict[str, Any]] = {name: dict(section) for name, section in unpadded.items()}
    if model_type == DSTRAIN_ENCODER_TYPE:
        last["model"] = {"attention": "auto", "kind": "dstrain-encoder"}
        found.append(Variant("+ dstrain's encoder", "the same weights by dstrain's own code", dict(last)))
    if compiles:
        last["engine"] = {"compile": "blocks"}
        found.append(Variant("+ compiled blocks", "elementwise work fused, few shapes", dict(last)))
    last["train"] = {"micro_batch": 2 * micro_batch}
    found.append(Variant("+ twice the micro-batch", "fewer, larger forwards", dict(last)))
    return tuple(found)


def learning_variants(best: Variant) -> tuple[Variant, ...]:
    """Switches that change what is learned, each by itself on the best variant: what a step of each costs or saves.

    Args:
        best: of the waterfall.
    """
    forever = 1_000_000_000  # so that the first share holds for all steps measured
    switches: tuple[tuple[str, str, dict[str, dict[str, Any]]], ...] = (
        ("with StableAdamW", "rates clipped by how far second moments lag", {"optimizer": {"kind": "stable_adamw"}}),
        ("with LAMB", "updates in proportion to each parameter's norm", {"optimizer": {"kind": "lamb"}}),
        ("with Muon", "momentum of the layers' matrices orthogonalised", {"optimizer": {"kind": "muon"}}),
        ("with token dropping", "half of the tokens in the middle layers", {"token_dropping": {"first_share": 0.5, "steps": forever}}),
        ("with layer dropping", "half of the last layer's visits left out", {"layer_dropping": {"last_keep": 0.5, "gamma": 10.0}}),
    )  # fmt: skip
    return tuple(
        Variant(name, what, {**best.sections, **sections}, changes_learning=True) for name, what, sections in switches
    )
