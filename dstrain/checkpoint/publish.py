"""Rank 0's last act of a save: the small files, the manifest, a look at the whole, and one rename that makes it a checkpoint."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dstrain.base.errors import CheckpointError
from dstrain.base.storage import make_directory, publish_directory, rename, write_bytes, write_text
from dstrain.checkpoint.layout import step_folder
from dstrain.checkpoint.manifest import CheckpointManifest, read_manifest, write_manifest
from dstrain.checkpoint.rank_file import Part, check_from_disk
from dstrain.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint besides the ranks' files."""

    manifest: Mapping[str, Any]
    """The fields of CheckpointManifest without `files` and `read_back`."""
    config_yaml: str
    tokenizer: Path | None
    """A folder whose files are copied in."""


def publish(
    staging: Path, folder: Path, contents: Contents, parts: list[Part], *, verify: bool, check_owner: Callable[[], None]
) -> int:
    """Complete a staging folder that holds every rank's durable file, and publish it.

    Args:
        staging: where the parts are.
        folder: `checkpoints/` of the run.
        contents: the rest.
        parts: every rank's.
        verify: read the small files back as well.
        check_owner: raises when the run belongs to another job by now; asked immediately before the rename.

    Returns:
        Bytes of all files.

    Raises:
        StorageError: the disk.
        CheckpointError: the fragments do not make a whole checkpoint.
        RunInUseError: from `check_owner`.
    """
    files: dict[str, Any] = {
        part.name: {"size_bytes": part.size_bytes, "sha256": part.sha256, "fragments": part.fragments} for part in parts
    }
    small = _write_small_files(staging, contents)
    if verify:
        for name, entry in small.items():
            check_from_disk(staging / name, entry["sha256"])
    fields = {**contents.manifest, "files": {**files, **small}, "read_back": verify and all(p.read_back for p in parts)}
    try:
        manifest = CheckpointManifest.model_validate(fields, strict=False)
    except ValidationError as error:
        raise CheckpointError(f"{staging.name}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    write_manifest(staging, manifest)
    Checkpoint(staging, trust_owner=True)  # as a reader will see it: coverage, sizes
    check_owner()
    final = step_folder(folder, int(contents.manifest["step"]))
    if final.exists():
        move_aside(final)
    publish_directory(staging, final)
    return sum(entry.size_bytes for entry in manifest.files.values())


def move_aside(final: Path) -> None:
    """Take a checkpoint's name from a folder: a damaged one is kept for inspection, a whole one is of a course that was rolled back.

    Raises:
        StorageError: it cannot be renamed.
    """
    try:
        read_manifest(final)
        kind = "superseded"
    except CheckpointError:
        kind = "damaged"
    rename(final, final.with_name(f"{kind}-{final.name}-{uuid.uuid4().hex[:8]}"))


def _write_small_files(staging: Path, contents: Contents) -> dict[str, Any]:
    text = contents.config_yaml
    files: dict[str, Any] = {
        "config.yaml": {"size_bytes": len(text.encode()), "sha256": write_text(staging / "config.yaml", text)}
    }
    if contents.tokenizer is not None:
        make_directory(staging / "tokenizer")
        for source in sorted(p for p in contents.tokenizer.iterdir() if p.is_file() and not p.name.startswith(".")):
            data = source.read_bytes()
            name = f"tokenizer/{source.name}"
            files[name] = {"size_bytes": len(data), "sha256": write_bytes(staging / name, data)}
    return files
