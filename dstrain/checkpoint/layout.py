"""Names on disk: where checkpoints, staging folders and their files lie inside a run folder. Pure path arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
FOLDER = "checkpoints"

_STEP = re.compile(r"step-(\d{8,})")
_SUPERSEDED = re.compile(r"superseded-step-(\d{8,})-[0-9a-f]+")
_FRAGMENT_FILE = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")
_EXTRA_FILE = re.compile(r"(tokenizer/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / FOLDER


def step_folder(folder: Path, step: int) -> Path:
    """The published name of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def staging_folder(folder: Path, step: int, nonce: str) -> Path:
    """The name under which a checkpoint is written."""
    return folder / f".staging-{step:08d}-{nonce}"


def reports_folder(staging: Path) -> Path:
    """Where the ranks report on a save: beside its staging folder, so that no report can be published."""
    return staging.with_name(f"{staging.name}.reports")


def fragment_file(rank: int, world_size: int) -> str:
    """The file of one rank's fragments."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def is_fragment_file(name: str) -> bool:
    """Whether a file name is one that a rank writes."""
    return _FRAGMENT_FILE.fullmatch(name) is not None


def is_safe_name(name: str) -> bool:
    """Whether a manifest may name this file: plain, relative, at most one folder deep, never `..`."""
    return ".." not in name and _EXTRA_FILE.fullmatch(name) is not None


def published_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that carries a checkpoint's name, newest first; order comes from names, never clocks."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted(found, reverse=True)


def leftovers(folder: Path) -> list[Path]:
    """Staging and half-deleted folders of dead jobs."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith((".staging-", ".deleting-")))


def superseded(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of checkpoints that a rollback or a second save of their step has taken the name from."""
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _SUPERSEDED.fullmatch(path.name)))
