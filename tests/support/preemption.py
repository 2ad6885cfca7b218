"""A real two-rank run that is asked to stop in a chosen phase, found by what the run itself shows, never by a pause.

Phases are recognised by facts: signal handlers in place (/proc), files rewritten, events, staging folders, and the phase
files that each rank's watchdog writes. A chain stops one and the same run again and again and at last lets it finish;
what it must equal is a run of the same settings that nobody disturbed. `preemptions` plays any number of trials; the fast
tier (`tests/fault`) asks for one chain, `benchmarks/preemption.py` and the soak for many.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dstrain.checkpoint.layout import published_steps
from dstrain.checkpoint.reader import newest_valid
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from dstrain.data.tokenizer import train_tokenizer
from dstrain.health.signals import STOP_SIGNALS
from tests.support.http_range_server import RangeServer, serve_ranges
from tests.support.run_view import RunView
from tests.support.runs import Job, pretrain_job, pretrain_settings, step_events, wait_for, write_config, write_corpus
from tests.support.zygote import Zygote

STEPS = 64
PHASES = (
    "step", "restore", "first step", "evaluation", "save", "data", "start-up", "start-up reads", "evaluation reads",
)  # fmt: skip
"""What a forked rank can be met in; "import" is the tenth, of a process that starts from nothing."""
_UNANSWERED = {"data": "/train/shard", "start-up reads": "/tokenizer/", "evaluation reads": "/validation/"}
"""Phases in which a store that does not answer is waited for, and what it does not answer."""
AT_ONCE_S = 30.0
"""In which a stop must end such a wait, on a busy machine too; the reads themselves would go on for 300 seconds."""


def build_shards_with_many_held_out(folder: Path) -> Path:
    """Small blocks, of which few are fetched ahead, and enough held-out rows for an evaluation that can be met."""
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=900)
    texts = (d.text for d in read_documents(find_sources([str(corpus)]), CorpusConfig()))
    train_tokenizer(texts, kind="wordpiece", vocab_size=400, lowercase=True, out=folder / "tok", quiet=True)
    config = ShardBuildConfig(block_tokens=256, validation_fraction=0.3)
    build_shards([str(corpus)], tokenizer=folder / "tok", out=folder / "shards", config=config, quiet=True)
    return folder / "shards"


def settings(shards: Path, run: Path) -> dict[str, Any]:
    """Of every run here."""
    return pretrain_settings(
        shards, run,
        data={"sequence_length": 48, "prefetch_steps": 1, "storage": {"prefetch_bytes": 4096}},
        train={"max_steps": STEPS, "evaluate_every": 8, "evaluate_rows": 400},
        checkpoint={"every_steps": 5, "keep_last": 1000},
        stop={"look_every_s": 0.05, "ask_every_s": 1.0},
        watchdog={"publish_s": 0.05, "poll_s": 0.02},
    )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One request: which signal, to which rank, in which phase."""

    phase: str
    signal: signal.Signals
    rank: int
    group: bool = False
    """To all processes that the rank has started, too."""

    def send(self, job: Job) -> None:
        """Do it."""
        if self.group:
            os.killpg(job.processes[self.rank].pid, self.signal)  # ranks are session leaders, and not reaped yet
        else:
            job.signal(self.signal, ranks=[self.rank])


@dataclass(frozen=True)
class Stopped:
    """How a trial ended."""

    step: int | None
    """Saved, as the ranks say; None when none had been done."""
    seconds: float
    """From the signal until the last rank had left."""
    steps_after: int
    """Done after the signal: the one in flight, and the one in which the ranks agree."""


class Chain:
    """One run folder that is stopped again and again."""

    def __init__(self, zygote: Zygote, server: RangeServer, folder: Path, name: str) -> None:
        self.run = folder / name
        self._zygote, self._server = zygote, server
        self._config = write_config(folder / f"{name}.yaml", settings(server.folder, self.run))

    def start(self, *overrides: str, environment: dict[str, str] | None = None) -> Job:
        """Start or go on."""
        return self._zygote.start_ranks(self._config, *overrides, world_size=2, environment=environment)

    def finish(self) -> Result:
        """Let the run go to its end."""
        with self.start() as job:
            job.succeed()
        return Result.of(self.run)

    def exits(self) -> list[dict[str, Any]]:
        """What both ranks left."""
        return [json.loads((self.run / "exit" / f"rank-{rank:05d}.json").read_text()) for rank in (0, 1)]

    def stop_in(self, trial: Trial) -> Stopped:
        """Start, stop in the phase, and check what every stop promises."""
        saved_before = max((step for step, _ in published_steps(self.run / "checkpoints")), default=None)
        view = RunView(self.run)
        with ExitStack() as stack:
            if trial.phase.endswith("reads"):
                stack.enter_context(self._server.hold(_UNANSWERED[trial.phase]))
            job = stack.enter_context(self._start_for(trial))
            if trial.phase == "data":
                wait_for(lambda: view.steps() >= 1, job=job)
                stack.enter_context(self._server.hold(_UNANSWERED["data"]))
            _wait_for_phase(trial, view, job, self._server)
            asked, asked_at = time.monotonic(), time.time()
            trial.send(job)
            codes = job.wait()
            seconds = time.monotonic() - asked
            said = f"{trial}: codes {codes}\n{job.output()}"
        assert seconds < AT_ONCE_S or trial.phase not in _UNANSWERED, said
        assert codes == [75, 75], said
        exits = self.exits()
        assert [e["code"] for e in exits] == [75, 75], said
        assert exits[trial.rank]["signal"] == trial.signal.name, said
        assert exits[0]["step"] == exits[1]["step"], said
        steps_after = self._check_saved(exits[0]["step"], saved_before, asked_at, said)
        return Stopped(exits[0]["step"], seconds, steps_after)

    def _start_for(self, trial: Trial) -> Job:
        if trial.phase == "import":
            return pretrain_job(self._config, world_size=2)
        # The same shards, behind a server that can be told to be silent.
        return self.start(*([f"data.path={self._server.url}"] if trial.phase in _UNANSWERED else []))

    def _check_saved(self, step: int, before: int | None, asked_at: float, said: str) -> int:
        """No step that was done is lost, whatever happened; returns how many were done after the request."""
        found = newest_valid(self.run / "checkpoints")
        assert not found.damaged, said
        newest = None if found.checkpoint is None else found.checkpoint.manifest.step
        taken = [event for event in step_events(self.run).values() if event["time"] > asked_at]
        assert len(taken) <= 2, (
            f"{len(taken)} steps after the request; {said}"
        )  # the one in flight, the one that agrees
        if newest is None:
            assert step in (0, None), said
        else:
            assert newest == max(step or 0, before or 0), said
            assert newest >= max(step_events(self.run), default=0), f"steps were lost; {said}"
        return len(taken)


@dataclass(frozen=True)
class Result:
    """What a finished run is compared by: bytes and exact numbers."""

    files: dict[str, str]
    """SHA-256 of every rank's file of the last checkpoint: weights and optimizer state."""
    curve: dict[int, tuple[str, str]]
    """Loss as a hex float and data ledger, of every step."""
    counters: dict[str, Any]

    @classmethod
    def of(cls, run: Path) -> Result:
        step, folder = max(published_steps(run / "checkpoints"))
        assert step == STEPS
        manifest = json.loads((folder / "manifest.json").read_text())
        return cls(
            {p.name: sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")},
            {n: (float(e["loss"]).hex(), str(e["step_ledger"])) for n, e in step_events(run).items()},
            {name: manifest["state"][name] for name in ("rows", "tokens", "ledger", "skipped_steps")},
        )


@dataclass(frozen=True)
class Record:
    """A trial that was played."""

    chain: int
    trial: Trial
    stopped: Stopped


@dataclass
class Drill:
    """All trials of a call of `preemptions`."""

    seed: int
    chains: int = 0
    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Of trials that broke a promise, and of chains whose end differs from that of the undisturbed run."""

    @property
    def trials(self) -> int:
        """Played, failed ones too."""
        return len(self.records) + sum(failure.startswith("trial") for failure in self.failures)

    @property
    def points(self) -> int:
        """Distinct combinations of phase, signal, rank and target."""
        return len({record.trial for record in self.records})


def preemptions(folder: Path, trials: int, *, seed: int, say: Callable[[str], None] = lambda _: None) -> Drill:
    """Stop runs again and again: chains that meet every phase once, in random order, with random signals to random targets.

    A chain ends with the run's completion and a comparison of its bytes with those of a run that nobody stopped. Nobody
    here asserts: what went wrong stands in `failures`.

    Args:
        folder: empty, for shards and runs.
        trials: stops, at least; chains are always played to their end.
        seed: of all choices. When a request arrives within its phase is up to the machine.
        say: told of each trial.
    """
    chance, drill = random.Random(seed), Drill(seed)
    with Zygote(folder / "zygote.log") as zygote, serve_ranges(build_shards_with_many_held_out(folder)) as server:
        undisturbed = Chain(zygote, server, folder, "undisturbed").finish()
        while drill.trials < trials:
            _play_chain(drill, Chain(zygote, server, folder, f"chain-{drill.chains}"), undisturbed, chance, say)
            drill.chains += 1
    return drill


def _play_chain(
    drill: Drill, chain: Chain, undisturbed: Result, chance: random.Random, say: Callable[[str], None]
) -> None:
    phases = [*PHASES, "import"]
    chance.shuffle(phases)
    for phase in phases:
        trial = Trial(phase, chance.choice(STOP_SIGNALS), chance.randrange(2), group=chance.random() < 0.25)
        try:
            drill.records.append(Record(drill.chains, trial, chain.stop_in(trial)))
        except AssertionError as broken:
            drill.failures.append(f"trial {drill.trials} (seed {drill.seed}, chain {drill.chains}): {broken}")
        say(f"{drill.trials}: {trial}")
    try:
        same = chain.finish() == undisturbed
    except AssertionError as broken:
        drill.failures.append(f"chain {drill.chains} (seed {drill.seed}) does not complete: {broken}")
        return
    if not same:
        drill.failures.append(
            f"chain {drill.chains} (seed {drill.seed}) ends with other bytes than the undisturbed run"
        )


def _wait_for_phase(trial: Trial, view: RunView, job: Job, server: RangeServer) -> None:
    """Return when the rank is in the phase; "data": when one rank is out of data, and the other waits for it in the step."""
    pids = [process.pid for process in job.processes]
    reached: dict[str, Callable[[], bool]] = {
        "import": lambda: _catches(pids[trial.rank], signal.SIGUSR1),
        "start-up": lambda: _catches(pids[trial.rank], signal.SIGUSR1),
        "start-up reads": lambda: server.waiting >= len(pids),
        "evaluation reads": lambda: server.waiting >= len(pids),
        "restore": view.is_described,
        "first step": view.is_open,
        "step": lambda: view.steps() >= 2,
        "evaluation": lambda: view.steps() >= 1 and view.phase(pids[trial.rank], trial.rank)[0] == "evaluate",
        "save": view.is_staging,
        "data": lambda: any(_is_stuck(view.phase(pid, rank)) for rank, pid in enumerate(pids)),
    }
    wait_for(reached[trial.phase], job=job)


def _is_stuck(seen: tuple[str, float]) -> bool:
    phase, seconds = seen
    return phase == "data" and seconds > 0.3


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: the first thing that a stage's command puts in place."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
