"""Trials of real training: ranks are killed at any instant, the run is started again, and its end is compared byte for byte.

Two real processes of torch and DeepSpeed (or one), gloo, dropout on, saves behind the training, the watchdog beside each
rank. Nobody here asserts: see `storage_trials`. What a kill of a launcher leaves is `tests/fault/test_supervisor.py`'s.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dstrain.checkpoint.layout import published_steps
from dstrain.checkpoint.reader import newest_valid
from tests.support.runs import BERT, Job, build_tiny_shards, pretrain_settings, step_events, write_config
from tests.support.storage_trials import Tally
from tests.support.zygote import Zygote

STEPS = 14
EVERY = 3
_NOT_STATE = ("environment", "health")
"""What a manifest says of machines and costs: another in every run."""
_LIMIT_S = 180.0


@dataclass(frozen=True)
class Setting:
    """How a run is trained."""

    world_size: int
    zero_stage: int
    precision: str

    @property
    def name(self) -> str:
        """For people and files."""
        return f"world-{self.world_size}-zero-{self.zero_stage}-{self.precision}"


SETTINGS = (
    Setting(1, 0, "fp32"), Setting(1, 1, "bf16"), Setting(2, 0, "bf16"), Setting(2, 1, "fp32"), Setting(2, 1, "bf16"),
    Setting(2, 2, "fp32"), Setting(2, 3, "fp32"), Setting(2, 3, "bf16"),
)  # fmt: skip


@dataclass
class Kills(Tally):
    """Adds where the kills fell and what they cost."""

    phases: dict[str, int] = field(default_factory=dict)
    lost_steps: list[int] = field(default_factory=list)
    """Steps that were done and not saved, of each kill."""
    during_a_save: int = 0


class TrainingBench:
    """Shards, a process that forks ranks, and what undisturbed runs end with."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        """Use an empty or missing folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._zygote = folder, zygote
        self._shards = build_tiny_shards(folder, num_documents=60)
        self._references: dict[Setting, tuple[dict[str, Any], float]] = {}
        self._runs = 0

    def reference(self, setting: Setting) -> tuple[dict[str, Any], float]:
        """How a run ends that nobody disturbs, and its seconds."""
        if setting not in self._references:
            run = self.fresh(setting)
            started = time.monotonic()
            with self.start(run, setting) as job:
                job.succeed(_LIMIT_S)
            self._references[setting] = end_of(run), time.monotonic() - started
            shutil.rmtree(run)
        return self._references[setting]

    def fresh(self, setting: Setting) -> Path:
        """The folder of a run that has not begun."""
        self._runs += 1
        run = self.folder / f"run-{self._runs:05d}"
        dropout = {**BERT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        settings = pretrain_settings(
            self._shards, run, model={"config": dropout}, train={"max_steps": STEPS},
            engine={"zero_stage": setting.zero_stage, "precision": setting.precision},
            checkpoint={"every_steps": EVERY},
        )  # fmt: skip
        write_config(run.with_suffix(".yaml"), settings)
        return run

    def start(self, run: Path, setting: Setting) -> Job:
        """Begin it or go on."""
        return self._zygote.start_ranks(run.with_suffix(".yaml"), world_size=setting.world_size)


def end_of(run: Path) -> dict[str, Any]:
    """What a finished run is compared by: every byte of its last checkpoint's tensors, every number of its curve."""
    folder = max(published_steps(run / "checkpoints"))[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = {p.name: sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}
    state = {name: value for name, value in manifest.items() if name not in (*_NOT_STATE, "files", "sha256")}
    state["state"] = {name: value for name, value in state["state"].items() if "seconds" not in name}
    numbers = ("loss", "accuracy", "grad_norm", "step_ledger", "ledger")
    curve = {step: [repr(event.get(name)) for name in numbers] for step, event in step_events(run).items()}
    return {"tensors": tensors, "state": state, "curve": curve}


def random_kills(
    bench: TrainingBench, trials: int, *, seed: int, settings: tuple[Setting, ...] = SETTINGS, say: Any = None
) -> Kills:
    """Kill some ranks of a run at a random instant, or in a save; start it again; compare its end."""
    rng = random.Random(seed)
    tally = Kills()
    for trial in range(trials):
        setting = settings[trial % len(settings)]
        problems = _trial(bench, setting, rng, tally)
        tally.trials += 1
        tally.failures += [f"seed {seed}, trial {trial}, {setting.name}: {p}" for p in problems]
        if say is not None:
            say(tally)
    tally.points = len({s.name for s in settings[:trials]})
    return tally


def _trial(bench: TrainingBench, setting: Setting, rng: random.Random, tally: Kills) -> list[str]:
    expected, seconds = bench.reference(setting)
    run = bench.fresh(setting)
    with bench.start(run, setting) as job:
        phase = _reach_an_instant(run, job, rng, seconds)
        victims = sorted(rng.sample(range(setting.world_size), rng.randint(1, setting.world_size)))
        in_a_save = bool(list((run / "checkpoints").glob(".staging-*")))
        job.signal(9, victims)
        time.sleep(rng.random() * 0.2)  # a launcher ends the others, not at once
        job.signal(9)
        job.wait(30)
    tally.phases[phase] = tally.phases.get(phase, 0) + 1
    tally.during_a_save += in_a_save
    found = newest_valid(run / "checkpoints")
    saved = 0 if found.checkpoint is None else found.checkpoint.manifest.step
    lost = max(step_events(run), default=0) - saved
    tally.lost_steps.append(lost)
    problems = [f"{path.name}: {why}" for path, why in found.damaged]
    if lost > 2 * EVERY:
        problems.append(f"{lost} steps were lost, the interval is {EVERY}")
    with bench.start(run, setting) as job:
        codes = job.wait(_LIMIT_S)
        if any(codes):
            return [*problems, f"started again after a kill of {victims} in {phase}: {codes}\n{job.output()}"]
    problems += differences(expected, end_of(run), f"killed {victims} in {phase}, resumed from step {saved}")
    shutil.rmtree(run)
    return problems


def differences(expected: dict[str, Any], found: dict[str, Any], where: str) -> list[str]:
    """What differs between two ends, shortly."""
    return [
        f"{where}: {part} {name}: {found[part].get(name)!r:.200}, undisturbed {wanted.get(name)!r:.200}"
        for part, wanted in expected.items()
        for name in sorted({*wanted, *found[part]}, key=str)
        if wanted.get(name) != found[part].get(name)
    ]


def _reach_an_instant(run: Path, job: Job, rng: random.Random, seconds: float) -> str:
    """Wait for a moment to kill in: a random one of the whole run, or one in a save; returns what to call it."""
    if rng.random() < 0.5:
        _sleep(rng.uniform(0, seconds), job)
        steps = max(step_events(run), default=0)
        return "after its end" if _ended(job) else "start" if not steps else "training"
    wanted = rng.randint(1, (STEPS - 1) // EVERY)
    seen: set[str] = set()
    while len(seen) < wanted and not _ended(job):
        seen |= {p.name for p in (run / "checkpoints").glob(".staging-*")}
        time.sleep(0.0005)
    _sleep(rng.random() * 0.03, job)
    return "a save"


def _sleep(seconds: float, job: Job) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not _ended(job):
        time.sleep(min(0.005, max(0.0, until - time.monotonic())))


def _ended(job: Job) -> bool:
    return all(process.poll() is not None for process in job.processes)
