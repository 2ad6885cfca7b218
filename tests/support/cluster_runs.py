"""Tiny runs of two ranks for tests on several hosts, and what two runs must have in common to be called equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dstrain.base.config import merge
from dstrain.checkpoint.layout import published_steps
from tests.support.runs import pretrain_settings, step_events, write_config

STEPS = 300
"""Seconds of training, so that a test can meet a run at work."""
MIN_STEP_BUDGET_S = 8.0


def run_settings(shards: Path, run: Path, **sections: Any) -> dict[str, Any]:
    """Of every run here."""
    ours = {
        "train": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 50, "keep_last": 1000},
        "stop": {"look_every_s": 0.5, "ask_every_s": 1.0, "margin_s": 2.0},
        "watchdog": {"min_step_budget_s": MIN_STEP_BUDGET_S, "publish_s": 0.5},
    }
    return pretrain_settings(shards, run, **merge(ours, sections))


@dataclass(frozen=True)
class ClusterRun:
    """A run's folder and configuration."""

    folder: Path
    config: Path

    @classmethod
    def prepare(cls, home: Path, shards: Path, **sections: Any) -> ClusterRun:
        """Write the configuration of a run in `home`/run."""
        folder = home / "run"
        return cls(folder, write_config(home / "run.yaml", run_settings(shards, folder, **sections)))

    @property
    def step(self) -> int:
        """The last step that is on record."""
        return max(step_events(self.folder), default=0)

    def exits(self) -> list[dict[str, Any]]:
        """What the ranks left, in their order."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / "exit").glob("rank-*.json"))]

    def result(self) -> Result:
        """What it came to."""
        return Result.of(self.folder)


@dataclass(frozen=True)
class Result:
    """What a finished run is compared by: bytes and exact numbers."""

    curve: dict[int, tuple[str, str]]
    """Loss as a hex float and data ledger, of every step."""
    files: dict[str, str]
    """SHA-256 of every rank's file of the last checkpoint: weights and optimizer state."""
    counters: dict[str, Any]

    @classmethod
    def of(cls, run: Path) -> Result:
        step, folder = max(published_steps(run / "checkpoints"))
        assert step == STEPS
        state = json.loads((folder / "manifest.json").read_text())["state"]
        return cls(
            {n: (float(e["loss"]).hex(), str(e["step_ledger"])) for n, e in step_events(run).items()},
            {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")},
            {name: state[name] for name in ("rows", "tokens", "ledger", "skipped_steps")},
        )
