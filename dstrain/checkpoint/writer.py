"""Save: every rank writes its fragments into a staging folder, rank 0 writes the manifest last and publishes by one rename.

A kill at any instant leaves the previous checkpoints untouched and at most a staging folder, which nobody reads. Writing is
synchronous here. A failed save (full disk, I/O error) removes its staging folder and is reported, the same on all ranks;
whether training goes on is the caller's decision.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dstrain.base.config import Config
from dstrain.base.control import ControlPlane
from dstrain.base.errors import CheckpointError, DstrainError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import (
    make_directory,
    publish_directory,
    write_bytes,
    write_json,
    write_text,
)
from dstrain.checkpoint.layout import MANIFEST, fragment_file, leftovers, staging_folder, step_folder
from dstrain.checkpoint.manifest import CheckpointManifest, Fragment
from dstrain.checkpoint.retention import keep_newest

_LOG = get_logger(__name__)


class CheckpointConfig(Config):
    """When checkpoints are taken and how many are kept."""

    every_steps: int | None = Field(default=500, ge=1)
    """Optimizer steps between checkpoints; None saves only at the end and on a stop request."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept. The best by the evaluation metric is kept besides, when fine-tuning."""


class CheckpointWriter:
    """Saves checkpoints of one run."""

    def __init__(self, folder: Path, *, config: CheckpointConfig, control: ControlPlane) -> None:
        """Prepare the folder.

        Args:
            folder: `checkpoints/` of the run.
            config: the checkpoint section.
            control: agreements between ranks.
        """
        self.folder, self._config, self._control = folder, config, control

    def remove_leftovers(self) -> None:
        """Rank 0 only, and only while it holds the run's lease: delete what killed jobs left in staging."""
        for path in leftovers(self.folder):
            _LOG.info("removing %s, left by an interrupted save", path.name)
            shutil.rmtree(path, ignore_errors=True)

    def save(
        self, fragments: Iterable[Fragment], manifest: Mapping[str, Any], *, config_yaml: str, tokenizer: Path | None,
        protect: frozenset[int] = frozenset(),
    ) -> Path:  # fmt: skip
        """Collective. Write and publish a checkpoint, then apply retention.

        Args:
            fragments: this rank's share.
            manifest: the fields of CheckpointManifest without `files`.
            config_yaml: the resolved configuration, kept beside the tensors.
            tokenizer: folder to copy in, or None.
            protect: steps that retention must not delete (the best).

        Returns:
            The published folder.

        Raises:
            CheckpointError: some rank could not write; the same error on every rank, nothing half-written remains.
        """
        world, step = self._control.world, int(manifest["step"])
        staging = Path(self._control.from_first(self._open_staging(step) if world.is_first else ""))
        if staging == Path():
            raise CheckpointError(
                f"{self.folder}: no staging folder could be made for step {step}; see the log of rank 0"
            )
        report = self._write_fragments(staging, fragments)
        reports = self._control.gather_json(report)
        problems = [f"rank {r['rank']}: {r['error']}" for r in reports if r["error"]]
        if not problems and world.is_first:
            problems = self._publish(staging, step, manifest, reports, config_yaml, tokenizer)
        problems = self._control.from_first(problems)
        if problems:
            if world.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(f"checkpoint of step {step} was not saved: {'; '.join(problems)}")
        if world.is_first:
            keep_newest(self.folder, keep_last=self._config.keep_last, protect=protect)
        return step_folder(self.folder, step)

    def _open_staging(self, step: int) -> str:
        staging = staging_folder(self.folder, step, uuid.uuid4().hex[:12])
        try:
            make_directory(staging)
        except StorageError as error:
            _LOG.error("%s", error)
            return ""
        return str(staging)

    def _write_fragments(self, staging: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
        world = self._control.world
        name = fragment_file(world.rank, world.size)
        listing: list[tuple[str, str, int, int]] = []
        tensors: dict[str, Tensor] = {}
        for f in fragments:
            listing.append((f.name, f.state, f.offset, f.tensor.numel()))
            tensors[fragment_key(f.name, f.state, f.offset)] = f.tensor.cpu().contiguous()
        report = {"rank": world.rank, "name": name, "size_bytes": 0, "sha256": "", "fragments": listing, "error": ""}
        try:
            data = to_safetensors(tensors)
            report |= {"size_bytes": len(data), "sha256": write_bytes(staging / name, data)}
        except DstrainError as error:
            report["error"] = str(error)
        return report

    def _publish(
        self, staging: Path, step: int, manifest: Mapping[str, Any], reports: list[dict[str, Any]], config_yaml: str,
        tokenizer: Path | None,
    ) -> list[str]:  # fmt: skip
        """Rank 0: the small files, the manifest last, one rename."""
        try:
            files = {r["name"]: {k: r[k] for k in ("size_bytes", "sha256", "fragments")} for r in reports}
            files |= _write_small_files(staging, config_yaml, tokenizer)
            checked = CheckpointManifest.model_validate({**manifest, "files": _tuples(files)}, strict=False)
            write_json(staging / MANIFEST, checked.model_dump(mode="json"))
            final = step_folder(self.folder, step)
            if final.exists():  # a valid one would have been resumed from: this one is damaged, kept for inspection
                final.rename(self.folder / f"damaged-{final.name}-{uuid.uuid4().hex[:8]}")
            publish_directory(staging, final)
        except (DstrainError, OSError, ValueError) as error:
            return [f"rank 0: {error}"]
        return []


def fragment_key(name: str, state: str, offset: int) -> str:
    """The tensor's name inside a safetensors file."""
    return f"{name}|{state}|{offset}"


def _write_small_files(staging: Path, config_yaml: str, tokenizer: Path | None) -> dict[str, Any]:
    files: dict[str, Any] = {}
    files["config.yaml"] = {
        "size_bytes": len(config_yaml.encode()),
        "sha256": write_text(staging / "config.yaml", config_yaml),
    }
    if tokenizer is not None:
        make_directory(staging / "tokenizer")
        for source in sorted(p for p in tokenizer.iterdir() if p.is_file() and not p.name.startswith(".")):
            data = source.read_bytes()
            name = f"tokenizer/{source.name}"
            files[name] = {"size_bytes": len(data), "sha256": write_bytes(staging / name, data)}
    return files


def _tuples(files: Mapping[str, Any]) -> dict[str, Any]:
    return {k: {**v, "fragments": tuple(tuple(f) for f in v.get("fragments", ()))} for k, v in files.items()}
