"""What a run is doing, read from its folder alone: from any host that sees the folder, while it runs or afterwards.

Reads the ends of the events, the lease, what the watchdogs say of their ranks, exit files, checkpoints' manifests and the
records of attempts; asks no process and writes nothing. A part that is missing or damaged is left out, never guessed.
Whether a run is alive is judged by signs in its folder no older than `ALIVE_S`, by two machines' clocks.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dstrain.base.config import read_yaml
from dstrain.base.errors import ConfigError, DataError, DstrainError
from dstrain.base.storage import read_json
from dstrain.checkpoint.layout import checkpoints_folder, published_steps
from dstrain.checkpoint.manifest import read_manifest
from dstrain.health.lease import FILE_NAME as LEASE
from dstrain.launcher.history import AttemptRecord, read_history
from dstrain.launcher.outcome import RankExit, judge, read_exits
from dstrain.launcher.run_files import EVENTS, last_events
from dstrain.monitor.goodput import account
from dstrain.monitor.goodput_meter import read_attempts

ALIVE_S = 60.0
"""Without any sign for so long a run counts as silent: six heartbeats of its lease."""
HEALTH = "health"
_TAIL_BYTES = 1 << 20
_SMALL_BYTES = 1 << 20
_ETA_STEPS = 50

State = Literal["running", "silent", "complete", "stopped", "failed", "not started"]


@dataclass(frozen=True)
class RankStatus:
    """What the watchdog beside a rank said last."""

    rank: int
    host: str
    phase: str
    step: int
    in_phase_s: float
    allowance_s: float | None
    """How long the phase may last before it counts as a hang; None while nobody can say."""
    age_s: float
    """Of this word."""


@dataclass(frozen=True)
class SavedStatus:
    """The newest checkpoint whose manifest checks and whose files have their sizes."""

    step: int
    age_s: float
    read_back: bool
    """Whether its bytes were read from the disk again when it was written."""


@dataclass(frozen=True)
class RunStatus:
    """Everything `dstrain status` shows. JSON-able by `to_plain`."""

    folder: str
    stage: str
    """pretrain or finetune."""
    model: str
    """Kind of encoder."""
    state: State
    why: str
    """How it ended, or since when nothing is heard of it."""
    step: int
    max_steps: int | None
    eta_s: float | None
    numbers: Mapping[str, Any]
    """The newest point of the curves: loss, accuracy, tokens, tokens_per_second, mfu, cost_usd, ... as far as written."""
    evaluated: Mapping[str, Any]
    """The newest scores of held-out data, with their step."""
    saved: SavedStatus | None
    goodput: Mapping[str, Any]
    """Seconds by bucket, wall, ratio, attempts; empty before the first record."""
    ranks: tuple[RankStatus, ...]
    waits_for: str
    """What holds the run up, in words; empty when nothing does."""
    restarts: int
    """Of `dstrain launch`."""
    last_failure: str
    """Why the last attempt that failed did; empty when none has."""
    changed_at: float
    """Unix seconds of the newest sign."""

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def read_status(run_folder: Path, *, now: float | None = None) -> RunStatus:
    """Look at a run.

    Args:
        run_folder: of the run.
        now: Unix seconds, by default the clock's.

    Raises:
        ConfigError: the folder is not there, or holds no run.
    """
    if not run_folder.is_dir():
        raise ConfigError(f"{run_folder}: no such folder; give the run's folder (run_folder of its configuration)")
    if not is_run(run_folder):
        raise ConfigError(
            f"{run_folder}: no config.yaml here, so no run has begun in it; `dstrain runs DIR` lists those below a folder"
        )
    now = time.time() if now is None else now
    config = _configuration(run_folder)
    events = last_events(run_folder, tail_bytes=_TAIL_BYTES)
    ranks = tuple(_ranks(run_folder, now))
    exits = read_exits(run_folder)
    changed = _newest_sign(run_folder, events, ranks, now)
    state, why = _state(run_folder, exits, now - changed)
    steps = [event for event in events if event["event"] == "step"]
    point = steps[-1] if steps else {}
    attempts = read_attempts(run_folder)
    history = _history(run_folder)
    failed = [record for record in history if record.code not in (0, 75, 82) and record.ended is not None]
    max_steps = config.get("train", {}).get("max_steps")
    return RunStatus(
        folder=str(run_folder), stage="finetune" if "task" in config else "pretrain", model=_model(config), state=state, why=why,
        step=int(point.get("step", 0)), max_steps=max_steps if isinstance(max_steps, int) else None,
        eta_s=_eta_s(steps, max_steps) if state == "running" else None,
        numbers={name: value for name, value in point.items() if name not in ("event", "seconds", "step")},
        evaluated=next(({"step": e.get("step"), **e["metrics"]} for e in reversed(events) if e["event"] == "evaluated"), {}),
        saved=_saved(run_folder, now), goodput=account(attempts).to_plain() if attempts else {}, ranks=ranks,
        waits_for=_waits_for(ranks) if state == "running" else "", restarts=max(0, len(history) - 1),
        last_failure=failed[-1].cause if failed else "", changed_at=changed,
    )  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / "config.yaml").is_file() and (folder / EVENTS).is_file()


def find_runs(folder: Path, *, depth: int = 3) -> Iterator[Path]:
    """Run folders below (and at) a folder, in order of their names; does not look inside a run."""
    if is_run(folder):
        yield folder
        return
    if depth:
        try:
            inside = sorted(
                p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")
            )
        except OSError:
            return
        for child in inside:
            yield from find_runs(child, depth=depth - 1)


def _configuration(run_folder: Path) -> dict[str, Any]:
    try:
        return read_yaml(run_folder / "config.yaml")
    except DstrainError:
        return {}


def _history(run_folder: Path) -> list[AttemptRecord]:
    try:
        return list(read_history(run_folder))
    except DataError:
        return []


def _model(config: Mapping[str, Any]) -> str:
    model = config.get("model")
    inner = model.get("config") if isinstance(model, dict) else None
    return str(inner.get("model_type", "")) if isinstance(inner, dict) else ""


def _ranks(run_folder: Path, now: float) -> Iterator[RankStatus]:
    for path in sorted((run_folder / HEALTH).glob("rank-*.json")):
        try:
            said = read_json(path, limit_bytes=_SMALL_BYTES)
            allowance = said.get("allowance_s")
            yield RankStatus(
                rank=int(said["rank"]), host=str(said["host"]), phase=str(said["phase"]), step=int(said["step"]),
                in_phase_s=float(said["time_in_phase_s"]), allowance_s=None if allowance is None else float(allowance),
                age_s=max(0.0, now - float(said["time"])),
            )  # fmt: skip
        except (DataError, KeyError, TypeError, ValueError, AttributeError):
            continue


def _newest_sign(run_folder: Path, events: list[dict[str, Any]], ranks: tuple[RankStatus, ...], now: float) -> float:
    signs = [float(event["time"]) for event in events[-1:] if isinstance(event.get("time"), (int, float))]
    signs += [now - rank.age_s for rank in ranks]
    signs += [
        float(said["time"]) for said in _lease_files(run_folder, "*.beat") if isinstance(said.get("time"), (int, float))
    ]
    return max(signs, default=0.0)


def _lease_files(run_folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted((run_folder / LEASE).glob(pattern)):
        try:
            said = read_json(path, limit_bytes=_SMALL_BYTES)
        except DataError:
            continue
        if isinstance(said, dict):
            yield said


def _state(run_folder: Path, exits: tuple[RankExit, ...], silent_s: float) -> tuple[State, str]:
    owner = (list(_lease_files(run_folder, "*.json")) or [{}])[-1]  # epochs only grow
    if owner and not owner.get("released"):
        where = f"process {owner.get('pid')} on {owner.get('host')}" + (
            f", job {owner['job']}" if owner.get("job") else ""
        )
        if silent_s <= ALIVE_S:
            return "running", where
        if not exits:
            return (
                "silent",
                f"nothing heard of {where} for {duration(silent_s)}: killed, or its folder cannot be reached",
            )
    if not exits:
        return "not started", ""
    outcome = judge(exits, launcher_code=0, expected=True)
    if outcome.code == 0:
        return "complete", ""
    name = "ranks ended without a word" if outcome.code is None else f"code {int(outcome.code)} {outcome.code.name}"
    ended: State = "stopped" if outcome.code in (75, 82) else "failed"
    return ended, f"{name}: {outcome.cause}"


def _saved(run_folder: Path, now: float) -> SavedStatus | None:
    for step, folder in published_steps(checkpoints_folder(run_folder)):
        try:
            manifest = read_manifest(folder)
            if manifest.step != step or any(
                (folder / n).stat().st_size != f.size_bytes for n, f in manifest.files.items()
            ):
                continue
            return SavedStatus(step, max(0.0, now - (folder / "manifest.json").stat().st_mtime), manifest.read_back)
        except (DstrainError, OSError):
            continue
    return None


def _eta_s(steps: list[dict[str, Any]], max_steps: Any) -> float | None:
    """From the wall time of the last points, evaluations and saves included."""
    recent = steps[-_ETA_STEPS:]
    while len(recent) > 1 and recent[0]["step"] >= recent[-1]["step"]:  # before a restart that went back
        recent.pop(0)
    if len(recent) < 2 or not isinstance(max_steps, int):
        return None
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return max(0.0, pace * (max_steps - recent[-1]["step"])) if math.isfinite(pace) and pace >= 0 else None


def _waits_for(ranks: tuple[RankStatus, ...]) -> str:
    """Ranks that are elsewhere than most, or all of them when they have been in one phase for long."""
    fresh = [rank for rank in ranks if rank.age_s <= ALIVE_S]
    if not fresh:
        return ""
    usual = Counter(rank.phase for rank in fresh).most_common(1)[0][0]
    odd = [rank for rank in fresh if rank.phase != usual] or [r for r in fresh if r.phase not in ("step", "first_step")]
    if not odd:
        late = [r for r in fresh if r.allowance_s is not None and r.in_phase_s > r.allowance_s / 2]
        return f"step {late[0].step + 1}, for {duration(late[0].in_phase_s)}" if late else ""
    slowest = max(odd, key=lambda rank: rank.in_phase_s)
    named = ", ".join(f"{r.rank}" for r in odd[:6]) + (", ..." if len(odd) > 6 else "")
    who = "all ranks" if len(odd) == len(fresh) else f"rank{'s' if len(odd) > 1 else ''} {named}"
    limit = "" if slowest.allowance_s is None else f" of at most {duration(slowest.allowance_s)}"
    return f"{slowest.phase.replace('_', ' ')}: {who} on {slowest.host}, for {duration(slowest.in_phase_s)}{limit}"


def duration(seconds: float) -> str:
    """Shortly, for people: 45 s, 3 min, 2:05 h, 3 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"
