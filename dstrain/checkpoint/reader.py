"""Find the newest checkpoint that is whole, and read any range of any parameter's state from it, at any world and stage.

There is no `latest` pointer to trust: folders are scanned newest first and verified (manifest, sizes, hashes); a damaged one
is named and skipped. Loading is an interval intersection of the fragments stored with the fragments needed. Runs no code
from the files: JSON and safetensors only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dstrain.base.errors import CheckpointError
from dstrain.base.storage import file_sha256
from dstrain.checkpoint.layout import published_steps
from dstrain.checkpoint.manifest import MASTER, CheckpointManifest, Fragment, read_manifest
from dstrain.checkpoint.writer import fragment_key


@dataclass(frozen=True)
class _Stored:
    file: str
    offset: int
    count: int


class Checkpoint:
    """One checkpoint on disk whose manifest has been read and checked."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest and compare the sizes.

        Raises:
            CheckpointError: the manifest is missing or wrong, or a file is missing or has another size.
        """
        self.folder = folder
        self.manifest: CheckpointManifest = read_manifest(folder)
        self._where: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        for name, entry in self.manifest.files.items():
            self._check_size(name, entry.size_bytes)
            for parameter, state, offset, count in entry.fragments:
                self._where[parameter, state].append(_Stored(name, offset, count))

    def verify(self) -> None:
        """Hash every file.

        Raises:
            CheckpointError: naming the first file that differs.
        """
        for name, entry in self.manifest.files.items():
            try:
                found = file_sha256(self.folder / name)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name}: cannot be read: {error}") from None
            if found != entry.sha256:
                raise CheckpointError(
                    f"{self.folder / name}: content differs from its manifest (SHA-256); the file is damaged"
                )

    def load_into(self, fragments: Iterable[Fragment]) -> None:
        """Fill fragments in place, whatever world and stage wrote the checkpoint.

        Raises:
            CheckpointError: a needed range is not stored.
        """
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for fragment in fragments:
                done = 0
                for stored, begin, end in self._overlaps(fragment):
                    part = self._slice(handles, stack, fragment, stored, begin, end)
                    at = begin - fragment.offset
                    fragment.tensor[at : at + end - begin].copy_(part)
                    done += end - begin
                if done != fragment.tensor.numel():
                    raise CheckpointError(
                        f"{self.folder}: {fragment.name} {fragment.state}: {done} of {fragment.tensor.numel()} elements found"
                    )

    def tensors(self, state: str = MASTER) -> dict[str, Tensor]:
        """Whole fp32 tensors of one state under their parameter names, aliases left out."""
        whole = {
            name: torch.empty(math.prod(shape), dtype=torch.float32) for name, shape in self.manifest.parameters.items()
        }
        self.load_into(Fragment(name, state, 0, tensor) for name, tensor in whole.items())
        return {name: tensor.view(self.manifest.parameters[name]) for name, tensor in whole.items()}

    def check_model(self, shapes: dict[str, list[int]], *, fingerprint: str) -> None:
        """Raise CheckpointError, naming the first difference, unless the model has exactly these parameters."""
        if self.manifest.model_fingerprint == fingerprint:
            return
        saved = self.manifest.parameters
        for name in sorted({*saved, *shapes}):
            if saved.get(name) != shapes.get(name):
                there, here = saved.get(name, "absent"), shapes.get(name, "absent")
                raise CheckpointError(
                    f"{self.folder}: from another model: {name} is {there} in the checkpoint and {here} in this run; "
                    "use the model section of its config.yaml, or another run_folder"
                )

    def _check_size(self, name: str, size_bytes: int) -> None:
        path = self.folder / name
        try:
            found = path.stat().st_size
        except OSError:
            raise CheckpointError(f"{path}: missing, though the manifest lists it") from None
        if found != size_bytes or not path.is_file():
            raise CheckpointError(f"{path}: {found} bytes, the manifest says {size_bytes}; the file is torn")

    def _overlaps(self, fragment: Fragment) -> Iterator[tuple[_Stored, int, int]]:
        first, last = fragment.offset, fragment.offset + fragment.tensor.numel()
        for stored in self._where[fragment.name, fragment.state]:
            begin, end = max(first, stored.offset), min(last, stored.offset + stored.count)
            if begin < end:
                yield stored, begin, end

    def _slice(
        self, handles: dict[str, Any], stack: ExitStack, fragment: Fragment, stored: _Stored, begin: int, end: int
    ) -> Tensor:
        try:
            if stored.file not in handles:
                handles[stored.file] = stack.enter_context(safe_open(str(self.folder / stored.file), framework="pt"))
            view = handles[stored.file].get_slice(fragment_key(fragment.name, fragment.state, stored.offset))
            part: Tensor = view[begin - stored.offset : end - stored.offset]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / stored.file}: cannot be read: {error}") from None
        if part.dtype != torch.float32 or part.numel() != end - begin:
            raise CheckpointError(
                f"{self.folder / stored.file}: {fragment.name} {fragment.state} is not {end - begin} fp32 numbers"
            )
        return part


@dataclass(frozen=True)
class Found:
    """What a scan saw."""

    checkpoint: Checkpoint | None
    """The newest whole one."""
    damaged: tuple[tuple[Path, str], ...]
    """Newer ones that were skipped, and why."""


def newest_valid(folder: Path, *, at_step: int | None = None) -> Found:
    """Scan `checkpoints/`, newest first, and verify until one is whole.

    Args:
        folder: the run's checkpoints folder.
        at_step: consider only this step.
    """
    damaged: list[tuple[Path, str]] = []
    for step, path in published_steps(folder):
        if at_step is not None and step != at_step:
            continue
        try:
            checkpoint = Checkpoint(path)
            if checkpoint.manifest.step != step:
                raise CheckpointError(f"{path}: holds step {checkpoint.manifest.step}; give the folder back its name")
            checkpoint.verify()
        except CheckpointError as error:
            damaged.append((path, str(error)))
            continue
        return Found(checkpoint, tuple(damaged))
    return Found(None, tuple(damaged))
