"""The mean of a run's latest weights: what LAWA evaluates instead of the last ones (arXiv 2306.03241).

Made from saved checkpoints when it is asked for, so it costs training nothing, works for runs that are long over, and needs no
state of its own: how far back it reaches is a matter of `checkpoint.every_steps` and `checkpoint.keep_last`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.checkpoint.layout import checkpoints_folder, published_steps
from dstrain.checkpoint.reader import Checkpoint

_FORM = re.compile(r"last:([1-9]\d*)")


@dataclass(frozen=True)
class Average:
    """The weights of several checkpoints, averaged."""

    newest: Checkpoint
    """Whose architecture, tokenizer and counters go with them."""
    steps: tuple[int, ...]
    """That were averaged, oldest first."""
    weights: dict[str, Tensor]
    """fp32, by name."""


def average_of(run_folder: Path, form: str, *, step: int | None = None) -> Average:
    """Average a run's newest checkpoints.

    Args:
        run_folder: of the run.
        form: `last:K`, the K newest.
        step: the newest of them; None takes the newest there is.

    Raises:
        ConfigError: another form, or the run has fewer checkpoints than are asked for.
        CheckpointError: one of them is damaged, or of another model.
    """
    match = _FORM.fullmatch(form)
    if match is None:
        raise ConfigError(f"--average {form}: write last:K, for example last:5, the mean of the 5 newest checkpoints")
    count = int(match[1])
    paths = [(s, path) for s, path in published_steps(checkpoints_folder(run_folder)) if step is None or s <= step]
    if len(paths) < count or (step is not None and paths[0][0] != step):
        raise ConfigError(
            f"--average {form}: {run_folder} holds checkpoints of steps {[s for s, _ in reversed(paths)]} only: "
            "ask for fewer, or train with a larger checkpoint.keep_last"
        )
    checkpoints = [Checkpoint(path) for _, path in paths[:count]]
    newest = checkpoints[0]
    weights: dict[str, Tensor] = {}
    for number, checkpoint in enumerate(checkpoints):
        checkpoint.verify()
        if checkpoint.manifest.model_fingerprint != newest.manifest.model_fingerprint:
            raise CheckpointError(f"{checkpoint.folder}: is of another model than {newest.folder}; average fewer")
        for name, tensor in checkpoint.tensors().items():
            mean = weights.setdefault(name, tensor)
            if mean is not tensor:
                mean.add_((tensor - mean) / (number + 1))
    return Average(newest, tuple(s for s, _ in reversed(paths[:count])), weights)
