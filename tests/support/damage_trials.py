"""Trials of finding the newest good checkpoint among damaged ones. Nobody here asserts; see `storage_trials`."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from dstrain.checkpoint.layout import published_steps, step_folder
from dstrain.checkpoint.reader import newest_valid
from tests.support.checkpoint_damage import MANIFEST, WAYS
from tests.support.storage_trials import Bench, Tally
from tests.support.tiny_checkpoints import content, holds_step

STEPS = (2, 4, 6)
WORLD = 2


def damages(bench: Bench, trials: int, *, seed: int, ways: Sequence[object] = WAYS) -> Tally:
    """Damage the newest checkpoint, often others too, disturb what does not matter, and look what is found."""
    rng = random.Random(seed)
    tally = Tally(trials)
    seen = set()
    whole = bench.fresh()
    for step in STEPS:
        bench.save(whole, step, WORLD, keep_last=10)
    for trial in range(trials):
        run = bench.fresh()
        folder = run / "checkpoints"
        shutil.copytree(whole, folder, copy_function=shutil.copyfile)
        if rng.random() < 0.3:
            _disturb(rng, folder)
        done = []
        for step in STEPS[::-1]:
            way = rng.choice(ways)
            way(rng, step_folder(folder, step), [step_folder(whole, s) for s in STEPS if s != step])  # type: ignore[operator]
            done.append(way.__name__)  # type: ignore[attr-defined]
            if rng.random() < 0.6:
                break
        seen.add(tuple(done))
        problems = _problems(bench, folder)
        if rng.random() < 0.1:
            problems += _loads(folder) + _goes_on(bench, folder)
        tally.failures += [f"seed {seed}, trial {trial}, {' + '.join(done)}: {p}" for p in problems]
        shutil.rmtree(run)
    tally.points = len(seen)
    return tally


def is_sound(path: Path, reference: dict[str, bytes]) -> bool:
    """Whether a checkpoint's files are those that were saved; a manifest may be written differently if it says the same."""
    try:
        found = content(path)
        return _meaning(found) == _meaning(reference)
    except (OSError, ValueError, RecursionError):
        return False


def _meaning(files: dict[str, bytes]) -> dict[str, object]:
    return {name: json.loads(data) if name == MANIFEST else data for name, data in files.items()}


def _problems(bench: Bench, folder: Path) -> list[str]:
    sound = [step for step in STEPS if is_sound(step_folder(folder, step), bench.reference(step, WORLD))]
    expected = max(sound, default=None)
    try:
        found = newest_valid(folder)
    except Exception as error:  # noqa: BLE001  (whatever a damaged file makes it raise is a defect)
        return [f"unexpected {type(error).__name__}: {str(error)[:200]}"]
    step = None if found.checkpoint is None else int(found.checkpoint.folder.name[5:])
    problems = [] if step == expected else [f"loads step {step}, the newest good one is {expected}"]
    named = {path for path, _ in found.damaged}
    skipped = {path for number, path in published_steps(folder) if expected is None or number > expected}
    if step == expected and named != skipped:
        problems.append(f"skipped {sorted(p.name for p in skipped)} but named {sorted(p.name for p in named)}")
    return problems


def _loads(folder: Path) -> list[str]:
    """What is found really has the tensors of its step."""
    checkpoint = newest_valid(folder).checkpoint
    if checkpoint is None:
        return []
    states = checkpoint.manifest.states
    tensors = {(n, s): t.reshape(-1) for s in states for n, t in checkpoint.tensors(s).items()}
    return [] if holds_step(tensors, checkpoint.manifest.step) else ["the tensors are not those that were saved"]


def _goes_on(bench: Bench, folder: Path) -> list[str]:
    """The next save finds its place among the ruins."""
    bench.save(folder, 8, WORLD, keep_last=2, clean=True)
    found = newest_valid(folder).checkpoint
    return [] if found is not None and found.manifest.step == 8 else ["the next save is not what is found"]


def _disturb(rng: random.Random, folder: Path) -> None:
    """Clocks, pointers and strangers, none of which may matter."""
    for path in folder.iterdir():
        when = rng.randrange(0, 4_000_000_000)
        os.utime(path, (when, when))
    for name, junk in (
        ("latest", b"step-00000099"),
        ("latest_step", b"\xff\x00"),
        ("step-99999999.tmp", b""),
        ("step-x", b""),
    ):
        if rng.random() < 0.5:
            (folder / name).write_bytes(junk)
    if rng.random() < 0.5:
        (folder / "latest.link").symlink_to(rng.choice(["latest.link", "step-00000002", "/nowhere"]))
    for name in (".staging-00000008-dead", "step-", "step-000", ".deleting-step-00000001-ab"):
        if rng.random() < 0.5:
            (folder / name).mkdir()
