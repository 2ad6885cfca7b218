"""Where a new run's weights come from: a run folder, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.base.errors import ConfigError
from dstrain.checkpoint.layout import MANIFEST, checkpoints_folder, published_steps
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from dstrain.data.tokenizer import Tokenizer
from dstrain.models.huggingface import load_folder_weights, read_architecture
from dstrain.models.tiling import grown, sizes_of


@dataclass(frozen=True)
class Origin:
    """An existing model: its architecture, its weights and its tokenizer."""

    source: str
    architecture: Mapping[str, Any]
    tokenizer_folder: Path | None
    checkpoint: Checkpoint | None
    folder: Path

    def weights(self) -> dict[str, Tensor]:
        """fp32 tensors under Hugging Face names."""
        if self.checkpoint is not None:
            return self.checkpoint.tensors()
        return load_folder_weights(self.folder)


def find_origin(init_from: str | None, *, key: str = "init_from") -> Origin | None:
    """Look at what `model.init_from` (or another key of the section) names; None when it names nothing.

    Raises:
        ConfigError: the folder is missing or holds neither a run, a checkpoint nor a Hugging Face model.
    """
    if init_from is None:
        return None
    folder = Path(init_from)
    if not folder.is_dir():
        raise ConfigError(f"model.{key}: {folder}: no such folder (models are not downloaded; give a local folder)")
    if checkpoints_folder(folder).is_dir():
        return _from_checkpoint(best_checkpoint(folder))
    if (folder / MANIFEST).is_file():
        return _from_checkpoint(Checkpoint(folder))
    if (folder / "config.json").is_file():
        tokenizer = folder if (folder / "tokenizer.json").is_file() else None
        return Origin(str(folder), read_architecture(folder), tokenizer, None, folder)
    raise ConfigError(
        f"model.{key}: {folder}: neither a run folder (checkpoints/), nor a checkpoint (manifest.json), "
        "nor a Hugging Face folder (config.json)"
    )


def best_checkpoint(run_folder: Path, *, step: int | None = None) -> Checkpoint:
    """The checkpoint a finished run is known by: `step` if given, else its best by metric, else its newest valid one.

    Raises:
        ConfigError: there is none that is whole.
    """
    folder = checkpoints_folder(run_folder)
    newest = newest_valid(folder, at_step=step)
    if newest.checkpoint is not None and step is None:
        best = newest.checkpoint.manifest.state.get("best_step")
        if isinstance(best, int):
            chosen = newest_valid(folder, at_step=best)
            return chosen.checkpoint or newest.checkpoint
    if newest.checkpoint is None:
        reasons = "; ".join(reason for _, reason in newest.damaged)
        which = f"checkpoint of step {step}" if step is not None else "valid checkpoint"
        steps = ", ".join(str(s) for s, _ in published_steps(folder)[:12])
        hint = f"; there are checkpoints of steps {steps}" if steps else "; none was saved there yet: train first"
        raise ConfigError(f"{run_folder}: no {which}{f' ({reasons})' if reasons else hint}")
    return newest.checkpoint


def _from_checkpoint(checkpoint: Checkpoint) -> Origin:
    tokenizer = checkpoint.folder / "tokenizer"
    manifest = checkpoint.manifest
    architecture = plain_architecture(manifest.architecture)
    return Origin(
        str(checkpoint.folder), architecture, tokenizer if tokenizer.is_dir() else None, checkpoint, checkpoint.folder
    )


_OF_ONE_HEAD_OR_WRITER = (
    "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "num_labels", "id2label", "label2id",
    "problem_type",
)  # fmt: skip


def plain_architecture(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture without what belongs to one head or to the version that wrote it."""
    return {key: value for key, value in architecture.items() if key not in _OF_ONE_HEAD_OR_WRITER}


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids a model's configuration names."""
    return {
        "pad_token_id": tokenizer.pad_id,
        "cls_token_id": tokenizer.cls_id,
        "sep_token_id": tokenizer.sep_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": tokenizer.sep_id,
    }


def grow_from_smaller(model: nn.Module, folder: str, tokenizer: Tokenizer) -> None:
    """Fill a wrapped masked-LM model from a smaller one of its kind (`model.init_from_smaller`).

    Raises:
        ConfigError: it is none, has another tokenizer, or does not fit.
    """
    origin = find_origin(folder, key="init_from_smaller")
    assert origin is not None
    theirs = Tokenizer.load(origin.tokenizer_folder) if origin.tokenizer_folder is not None else tokenizer
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"model.init_from_smaller: {origin.source}: has another tokenizer than the data; use the same one"
        )
    inner: Any = model.model
    small, large = origin.architecture.get("model_type"), inner.config.model_type
    if small != large:
        raise ConfigError(f"model.init_from_smaller: {origin.source}: is a {small}, this model is a {large}")
    own = dict(inner.named_parameters())
    weights = grown(
        origin.weights(), {name: tuple(p.shape) for name, p in own.items()}, small=sizes_of(origin.architecture),
        large=sizes_of(inner.config.to_dict()), source=origin.source,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
