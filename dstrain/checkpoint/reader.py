"""Find the newest checkpoint that is whole, and read any range of any parameter's state from it, at any world and stage.

There is no `latest` pointer to trust: folders are scanned newest first and verified (manifest, sizes, hashes); a damaged one
is named and skipped. Loading is an interval intersection of the fragments stored with the fragments needed. Runs no code
from the files: JSON and safetensors only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dstrain.base.errors import CheckpointError
from dstrain.base.storage import file_sha256
from dstrain.checkpoint.layout import MANIFEST, published_steps
from dstrain.checkpoint.manifest import MASTER, CheckpointManifest, Fragment, fragment_key, read_manifest
from dstrain.checkpoint.ownership import check_owner


@dataclass(frozen=True)
class _Stored:
    file: str
    offset: int
    count: int


class Checkpoint:
    """One checkpoint on disk whose manifest has been read and checked."""

    def __init__(self, folder: Path, *, trust_owner: bool = False) -> None:
        """Read the manifest and compare the sizes.

        Args:
            folder: of the checkpoint.
            trust_owner: read it even if it belongs to another user than this one or root.

        Raises:
            CheckpointError: the manifest is missing or wrong, a file is missing or has another size, or the owner is not trusted.
        """
        self.folder = folder
        if not trust_owner:
            check_owner(folder, [MANIFEST])
        self.manifest: CheckpointManifest = read_manifest(folder)
        if not trust_owner:
            check_owner(folder, list(self.manifest.files))
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
                    _fill(fragment.tensor[at : at + end - begin], part)
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

    def check_optimizer(self, moments: Mapping[str, tuple[str, ...]], *, kind: str) -> None:
        """Raise CheckpointError unless it has the optimizer state that a run of this kind needs.

        Args:
            moments: names of the state tensors of each parameter.
            kind: optimizer.kind of the run.
        """
        manifest = self.manifest
        for name, wanted in moments.items():
            stored = manifest.parameter_states.get(name, manifest.states)
            if missing := [state for state in wanted if state not in stored]:
                raise CheckpointError(
                    f"{self.folder}: optimizer.kind: {kind} needs {missing[0]} of {name}, this checkpoint has "
                    f"{', '.join(stored)}: resume with the optimizer that wrote it, or begin a new run_folder with model.init_from"
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


def _fill(target: Tensor, part: Tensor) -> None:
    """Copy on one thread where both are on the host (as `snapshot` does, and for its reason), or over to the device."""
    if target.device.type == "cpu":
        np.copyto(target.detach().numpy(), part.numpy())
    else:
        target.copy_(part)


@dataclass(frozen=True)
class Found:
    """What a scan saw."""

    checkpoint: Checkpoint | None
    """The newest whole one."""
    damaged: tuple[tuple[Path, str], ...]
    """Newer ones that were skipped, and why."""


class SecondTier(Protocol):
    """Where copies of checkpoints lie (`checkpoint.mirror`)."""

    def steps(self) -> list[int]:
        """Steps that seem to be there, newest first."""
        ...

    def fetch(self, step: int, folder: Path) -> Path:
        """Copy one into `checkpoints/`, verified and published as a save would; returns its folder."""
        ...


def newest_valid(
    folder: Path, *, at_step: int | None = None, before_step: int | None = None, mirror: SecondTier | None = None,
    trust_owner: bool = False,
) -> Found:  # fmt: skip
    """Scan `checkpoints/`, newest first, and verify until one is whole; a newer whole one in the mirror is copied back first.

    Args:
        folder: the run's checkpoints folder.
        at_step: consider only this step.
        before_step: consider only older steps: one checkpoint further back.
        mirror: the second tier.
        trust_owner: read checkpoints of other users.

    Raises:
        StorageError: the mirror holds a newer one that cannot be written here.
    """
    damaged: list[tuple[Path, str]] = []

    def wanted(step: int) -> bool:
        return (at_step is None or step == at_step) and (before_step is None or step < before_step)

    local: Checkpoint | None = None
    for step, path in published_steps(folder):
        if not wanted(step):
            continue
        try:
            local = _verified(path, step, trust_owner)
            break
        except CheckpointError as error:
            damaged.append((path, str(error)))
    here = -1 if local is None else local.manifest.step
    for step in mirror.steps() if mirror is not None else []:
        if step <= here:
            break
        if not wanted(step):
            continue
        try:
            assert mirror is not None
            return Found(_verified(mirror.fetch(step, folder), step, trust_owner), tuple(damaged))
        except CheckpointError as error:
            damaged.append((Path(f"mirror:{step}"), str(error)))
    return Found(local, tuple(damaged))


def _verified(path: Path, step: int, trust_owner: bool) -> Checkpoint:
    checkpoint = Checkpoint(path, trust_owner=trust_owner)
    if checkpoint.manifest.step != step:
        raise CheckpointError(f"{path}: holds step {checkpoint.manifest.step}; give the folder back its name")
    checkpoint.verify()
    return checkpoint
