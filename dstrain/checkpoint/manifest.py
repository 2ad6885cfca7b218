"""A checkpoint's manifest: what it holds, from which run, and the size and hash of every file. Strict JSON, no pickle.

The manifest is written last; a folder without one that checks is not a checkpoint. It carries the hash of its own content, so
that a damaged number in it is found like a damaged tensor. Format version 2 (version 1 had no such hash).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from dstrain.base.config import Config
from dstrain.base.errors import CheckpointError, DataError
from dstrain.base.storage import read_json, write_json
from dstrain.checkpoint.layout import MANIFEST, is_safe_name

FORMAT_VERSION = 2
_SEAL = "sha256"

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (MASTER, *MOMENTS)

_MAX_ELEMENTS = 1 << 40
_ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one flattened parameter's state, as one rank holds it."""

    name: str
    """Parameter name as the Hugging Face model knows it."""
    state: str
    """fp32, or the name of an optimizer's state tensor: exp_avg, exp_avg_sq, momentum_buffer."""
    offset: int
    """First element inside the flattened parameter."""
    tensor: Tensor
    """(n,) fp32; a view of the engine's memory where a rank saves or loads."""


class FileEntry(Config):
    """One file of a checkpoint."""

    size_bytes: int = Field(ge=0)
    """Exact size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the whole file."""
    fragments: tuple[tuple[str, str, int, int], ...] = ()
    """(parameter, state, offset, elements) of every fragment inside."""


class CheckpointManifest(Config):
    """All there is to know about a checkpoint without opening its tensors."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a counter that is no number stays what it is

    format: Literal["dstrain-checkpoint"] = "dstrain-checkpoint"
    """Says what the file is."""
    format_version: int = FORMAT_VERSION
    """Raised when the meaning of anything here changes."""
    step: int = Field(ge=0)
    """Optimizer steps done."""
    world_size: int = Field(ge=1)
    """Ranks that wrote it; any number may read it."""
    zero_stage: int = Field(ge=0, le=3)
    """Stage that wrote it; any stage may read it."""
    precision: str
    """Training precision of the writer; the state itself is always fp32."""
    stage: str
    """pretrain or finetune."""
    parameters: dict[str, list[int]]
    """Shape of every trained parameter."""
    model_fingerprint: str
    """Hash of the names and shapes."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Tied names: alias → the name that is stored."""
    architecture: dict[str, Any]
    """The model's transformers configuration."""
    state: dict[str, Any]
    """The run's counters (base.protocols.RunState)."""
    loader: dict[str, Any]
    """What pins the data order."""
    optimizer: dict[str, Any]
    """The optimizer's step counter and the loss scaler."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """What the stage adds, e.g. a task's labels."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Versions that wrote it."""
    health: dict[str, Any] = Field(default_factory=dict)
    """What the guards and the save interval want to remember; empty in checkpoints written before it was kept."""
    read_back: bool = False
    """Whether every other file was read from the disk again and hashed before this one was written."""
    states: tuple[str, ...]
    """Which state tensors each parameter has, unless `parameter_states` says otherwise."""
    parameter_states: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Of parameters with other state tensors, e.g. Muon's matrices; empty in checkpoints written before there were any."""
    files: dict[str, FileEntry]
    """Every file but this one."""

    @field_validator("files")
    @classmethod
    def _names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not is_safe_name(name):
                raise ValueError(f"refused file name {name!r}")
        return files

    @field_validator("parameters")
    @classmethod
    def _shapes(cls, parameters: dict[str, list[int]]) -> dict[str, list[int]]:
        for name, shape in parameters.items():
            if any(n < 0 for n in shape) or math.prod(shape) > _MAX_ELEMENTS:
                raise ValueError(f"refused shape {shape} of {name}")
        return parameters


def fragment_key(name: str, state: str, offset: int) -> str:
    """The tensor's name inside a safetensors file."""
    return f"{name}|{state}|{offset}"


def model_fingerprint(parameters: Mapping[str, list[int]]) -> str:
    """Hash of parameter names and shapes: two models with the same one can exchange checkpoints."""
    return hashlib.sha256(json.dumps(sorted(parameters.items())).encode()).hexdigest()


def stored_states(moments: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """`states` and `parameter_states` of a manifest, for the optimizer's state tensors of each parameter."""
    others = {name: (MASTER, *some) for name, some in moments.items() if some != MOMENTS}
    return {"states": STATES, "parameter_states": others}


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's JSON with the hash of what it says under `sha256`; how it is laid out on lines does not matter.

    Guards against damage, not against a forger, who can compute it as well.
    """
    plain = json.loads(json.dumps(data))  # as a reader will see it: keys are strings
    return {**plain, _SEAL: _seal_of(plain)}


def _seal_of(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write a manifest, sealed, durably.

    Raises:
        StorageError: the disk.
    """
    write_json(folder / MANIFEST, sealed(manifest.model_dump(mode="json")))


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read and check a manifest, its version, its hash and its coverage; opens no tensor file.

    Raises:
        CheckpointError: missing, damaged, not valid, of another version, or its fragments leave gaps.
    """
    try:
        return parse_manifest(read_json(folder / MANIFEST), folder / MANIFEST)
    except DataError as error:
        raise CheckpointError(str(error)) from None


def parse_manifest(data: Any, path: Path | str) -> CheckpointManifest:
    """Check what was read from a manifest, `path` in messages; raises CheckpointError as `read_manifest` does."""
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r}; this dstrain reads version {FORMAT_VERSION}")
    if _seal_of(data) != data.get(_SEAL):
        raise CheckpointError(f"{path}: content differs from its own SHA-256; the file is damaged")
    del data[_SEAL]
    try:
        manifest = CheckpointManifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        raise CheckpointError(f"{path}: {key}: {first['msg']}") from None
    check_coverage(manifest, path)
    return manifest


def check_coverage(manifest: CheckpointManifest, path: Path | str) -> None:
    """Raise CheckpointError unless every element of every state of every parameter is stored exactly once."""
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for file, entry in manifest.files.items():
        for name, state, offset, count in entry.fragments:
            spans.setdefault((name, state), []).append((offset, offset + count))
        claimed = _ELEMENT_BYTES * sum(count for *_, count in entry.fragments)
        if (
            claimed > entry.size_bytes
        ):  # sizes are compared with the disk, so nobody allocates what a hostile file claims
            raise CheckpointError(f"{path}: {file}: {claimed} bytes of fragments in {entry.size_bytes} bytes")
    for name, shape in manifest.parameters.items():
        for state in manifest.parameter_states.get(name, manifest.states):
            at = 0
            for begin, end in sorted(spans.pop((name, state), [])):
                if begin != at or end < begin:
                    raise CheckpointError(
                        f"{path}: {name} {state}: elements {min(at, begin)} to {max(at, begin)} are not stored once"
                    )
                at = end
            if at != math.prod(shape):
                raise CheckpointError(f"{path}: {name} {state}: {at} of {math.prod(shape)} elements are stored")
    if spans:
        raise CheckpointError(f"{path}: fragments of an unknown parameter: {next(iter(spans))}")
