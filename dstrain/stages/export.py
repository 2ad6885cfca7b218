"""Export a checkpoint as a native Hugging Face folder, on a CPU, without the training job; proven by a logits comparison.

The folder is loaded back with plain transformers (its own attention, no hook) and must give the logits of the weights in
the checkpoint before the folder gets its name.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.base.logs import get_logger
from dstrain.base.storage import make_directory, publish_directory, read_json, remove_directory, write_json, write_text
from dstrain.checkpoint.reader import Checkpoint
from dstrain.data.tokenizer import Tokenizer
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import (
    accepted_inputs,
    build_classifier,
    build_masked_lm,
    initialise,
    plain_logits,
    reload_logits,
    save_folder,
)
from dstrain.stages.averaging import average_of
from dstrain.stages.initial import best_checkpoint, plain_architecture, special_tokens
from dstrain.stages.model_card import model_card

TOLERANCE = 1e-5
"""Largest difference of fp32 logits between the checkpoint's weights and the exported folder."""

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What was exported."""

    step: int
    num_parameters: int
    max_difference: float


def export_run(
    run_folder: Path, out: Path, *, step: int | None = None, average: str | None = None, overwrite: bool = False
) -> ExportReport:  # fmt: skip
    """Write a Hugging Face folder, or nothing.

    Args:
        run_folder: of a pretraining or fine-tuning run.
        out: folder to make.
        step: checkpoint to export; None takes the best by metric, else the newest valid one.
        average: `last:K` exports the mean of the K newest checkpoints (up to `step`).
        overwrite: replace `out` if it is a model's folder.

    Raises:
        ConfigError: no such run or checkpoint, or `out` exists, or is nothing that may be replaced.
        CheckpointError: the exported logits differ.
    """
    if not run_folder.is_dir():
        raise ConfigError(f"{run_folder}: no such run folder")
    _check_target(out, run_folder, overwrite=overwrite)
    mean = average_of(run_folder, average, step=step) if average is not None else None
    checkpoint = mean.newest if mean is not None else best_checkpoint(run_folder, step=step)
    tokenizer = Tokenizer.load(checkpoint.folder / "tokenizer")
    module = rebuild(checkpoint, tokenizer, weights=mean.weights if mean is not None else None)
    make_directory(out.parent)
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        make_directory(staging)
        save_folder(module, staging)
        tokenizer.copy_to(staging)
        _trim_tokenizer_inputs(module, staging)
        write_text(
            staging / "README.md", model_card(run_folder, checkpoint, averaged=mean.steps if mean is not None else ())
        )
        difference = _compare(module, staging, tokenizer)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"export: the exported folder's logits differ by {difference:.1e} (limit {TOLERANCE:.0e}); nothing was written"
            )
        if out.exists():
            remove_directory(out)
        publish_directory(staging, out)
    finally:
        if staging.exists():
            remove_directory(staging)
    parameters = sum(p.numel() for p in module.parameters())
    return ExportReport(step=checkpoint.manifest.step, num_parameters=parameters, max_difference=difference)


def _check_target(out: Path, run_folder: Path, *, overwrite: bool) -> None:
    """Only an earlier export is ever removed: --overwrite behind a wrong --out must not cost a run or a corpus."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; give another --out")
    if run_folder.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out}: holds the run itself; give another --out")
    if not overwrite:
        raise ConfigError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    is_model = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
    if any(out.iterdir()) and not is_model:
        raise ConfigError(f"{out}: holds something that is no exported model; give another --out, or empty it")


def _trim_tokenizer_inputs(module: nn.Module, folder: Path) -> None:
    """Let the exported tokenizer make only the inputs that the model takes (ModernBERT and DistilBERT have no types)."""
    path = folder / "tokenizer_config.json"
    accepted = accepted_inputs(module)
    settings = read_json(path) if path.is_file() else {}
    names = settings.get("model_input_names") or ["input_ids", "token_type_ids", "attention_mask"]
    write_json(path, {**settings, "model_input_names": [name for name in names if name in accepted]})


def rebuild(
    checkpoint: Checkpoint, tokenizer: Tokenizer, *, weights: Mapping[str, Tensor] | None = None
) -> nn.Module:  # fmt: skip
    """The checkpoint's model in fp32 with its weights (or others of its names and shapes), on the CPU."""
    manifest = checkpoint.manifest
    config = ModelConfig(config={"model_type": manifest.architecture["model_type"]}, attention="padded", pad_vocab_to=1)
    extra: dict[str, Any] = dict(manifest.extra)
    architecture = plain_architecture(manifest.architecture)
    special = special_tokens(tokenizer)
    if manifest.stage == "pretrain":
        module: nn.Module = build_masked_lm(
            config, vocab_size=tokenizer.vocab_size, special=special, architecture=architecture
        )
    else:
        labels = tuple(extra.get("labels", ()))
        regression = extra.get("task") == "regression"
        module = build_classifier(
            config, num_labels=1 if regression else len(labels), labels=labels, regression=regression,
            vocab_size=tokenizer.vocab_size, special=special, architecture=architecture,
        )  # fmt: skip
    fresh = initialise(module, checkpoint.tensors() if weights is None else weights, source=str(checkpoint.folder))
    if fresh:
        raise CheckpointError(f"{checkpoint.folder}: does not hold {', '.join(fresh)}")
    return module.eval()


def _compare(module: nn.Module, folder: Path, tokenizer: Tokenizer) -> float:
    """Largest logit difference on a fixed text, between the module and the folder loaded by plain transformers."""
    ids = torch.arange(24) * 7919 % max(1, tokenizer.vocab_size - 8) + 5
    tokens: Tensor = torch.cat(
        [torch.tensor([tokenizer.cls_id]), ids % tokenizer.vocab_size, torch.tensor([tokenizer.sep_id])]
    )
    with torch.no_grad():
        return float((plain_logits(module, tokens) - reload_logits(folder, tokens)).abs().max())
