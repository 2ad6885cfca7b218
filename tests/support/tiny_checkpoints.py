"""Checkpoints of a made-up model, written by one rank without DeepSpeed, and the bytes on disk to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.base.control import ControlPlane
from dstrain.base.world import World
from dstrain.checkpoint.manifest import STATES, Fragment, model_fingerprint
from dstrain.checkpoint.writer import CheckpointConfig, CheckpointWriter

SHAPES = {"encoder.weight": [5, 3], "encoder.bias": [5], "scale": []}


def state_of(step: int) -> dict[tuple[str, str], Tensor]:
    """Flat fp32 tensors that are different at every step, odd bit patterns among them."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        (n, s): torch.randn(int(torch.Size(SHAPES[n]).numel()), generator=generator) for n in SHAPES for s in STATES
    }
    tensors["encoder.bias", "fp32"][:3] = torch.tensor([-0.0, float("inf"), 1e-42])
    return tensors


def fragments_of(tensors: Mapping[tuple[str, str], Tensor], *, parts: int = 2) -> Iterator[Fragment]:
    """The tensors cut into `parts` fragments each, as several ranks would hold them."""
    for (name, state), tensor in tensors.items():
        n = tensor.numel()
        for i in range(parts):
            a, b = i * n // parts, (i + 1) * n // parts
            if a < b:
                yield Fragment(name, state, a, tensor[a:b])


def manifest_of(step: int, **fields: Any) -> dict[str, Any]:
    """Everything but the files."""
    fixed = {
        "step": step, "world_size": 1, "zero_stage": 1, "precision": "fp32", "stage": "pretrain", "parameters": SHAPES,
        "model_fingerprint": model_fingerprint(SHAPES), "architecture": {"model_type": "bert"}, "state": {"step": step},
        "loader": {"epoch": 0}, "optimizer": {"step": step}, "states": STATES,
    }  # fmt: skip
    return {**fixed, **fields}


def writer_of(folder: Path, *, keep_last: int = 10) -> CheckpointWriter:
    """A writer of one rank."""
    config = CheckpointConfig(every_steps=1, keep_last=keep_last)
    return CheckpointWriter(folder, config=config, control=ControlPlane(World()))


def save(folder: Path, step: int, *, keep_last: int = 10, tokenizer: Path | None = None, **options: Any) -> Path:
    """Publish the checkpoint of a step."""
    return writer_of(folder, keep_last=keep_last).save(
        fragments_of(state_of(step)), manifest_of(step), config_yaml="seed: 7\n", tokenizer=tokenizer, **options
    )


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def holds_step(tensors: Mapping[tuple[str, str], Tensor], step: int) -> bool:
    """Whether the tensors are those of a step, bit for bit."""
    expected = state_of(step)
    return all(torch.equal(tensors[key].view(torch.int32), expected[key].view(torch.int32)) for key in expected)
