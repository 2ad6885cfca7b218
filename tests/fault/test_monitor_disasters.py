"""Logging can never stop or change training (promise P15): whatever happens to it, a run completes with the same bits.

Each disaster strikes inside a real run, after step 3, through an observer that stands beside the monitor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import ExitCode
from dstrain.base.protocols import RunState, StepReport
from dstrain.base.world import World, free_port
from dstrain.checkpoint.reader import newest_valid
from dstrain.cli.training import load_stage_config
from dstrain.monitor import events as events_module
from dstrain.monitor.events import read_events
from dstrain.monitor.monitor import Monitor
from dstrain.stages.pretrain import pretrain
from tests.support.runs import build_tiny_shards, pretrain_settings, write_config

pytestmark = [
    pytest.mark.fault,
    # TensorBoard's writing thread dies with a traceback when its file goes away.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

STRIKES_AFTER = 3
STEPS = 8


@dataclass
class Scene:
    """What a disaster can reach."""

    monitor: Monitor
    run: Path
    patch: pytest.MonkeyPatch
    spare: list[Any] = field(default_factory=list)

    @property
    def events(self) -> Path:
        return self.run / "events.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What training made of it."""

    code: ExitCode
    losses: list[str]
    """Every step's loss and gradient norm as exact hexadecimal floats."""
    state: str
    """Hash of all weights and moments."""
    dropped: int


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def train(folder: Path, shards: Path, patch: pytest.MonkeyPatch, disaster: Callable[[Scene], None]) -> Outcome:
    settings = pretrain_settings(
        shards, folder / "run", monitor={"tensorboard": True}, watchdog={"enabled": False},
        train={"max_steps": STEPS}, checkpoint={"every_steps": STEPS},
    )  # fmt: skip
    config = load_stage_config("pretrain", write_config(folder / "run.yaml", settings), [])
    losses: list[str] = []
    monitors: list[Monitor] = []
    on_step = Monitor.on_step

    def watched(monitor: Monitor, state: RunState, report: StepReport) -> None:
        losses.append(f"{report.step} {report.loss.hex()} {report.gradient_norm.hex()}")
        on_step(monitor, state, report)
        if report.step == STRIKES_AFTER:
            monitors.append(monitor)
            disaster(Scene(monitor, folder / "run", patch))

    patch.setattr(Monitor, "on_step", watched)
    code = pretrain(config, World(master_port=free_port()))
    checkpoint = newest_valid(folder / "run" / "checkpoints").checkpoint
    assert checkpoint is not None
    digest = hashlib.sha256()
    for state in checkpoint.manifest.states:
        for name, tensor in sorted(checkpoint.tensors(state).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    monitor = monitors[0]
    lost = monitor.events.dropped + monitor.failures + monitor.goodput.dropped
    return Outcome(
        code, losses, digest.hexdigest(), lost + (monitor._tensorboard.dropped if monitor._tensorboard else 0)
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        outcome = train(tmp_path_factory.mktemp("calm"), shards, patch, lambda scene: None)
    assert outcome.code is ExitCode.COMPLETE
    assert len(outcome.losses) == STEPS
    assert outcome.dropped == 0
    return outcome


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def _full_for(path: Path, write: Callable[[int, bytes], int] = os.write) -> Callable[[int, bytes], int]:
    def full(handle: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{handle}") == str(path):
            raise OSError(28, "no space left on device")
        return write(handle, data)

    return full


class _Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no words for it")


def _endless() -> dict[str, Any]:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    return endless


def _steal_descriptor(scene: Scene) -> None:
    """Close the log's handle and let another file take its number."""
    handle = scene.monitor.events._handle
    assert handle is not None
    os.close(handle)
    victim = os.open(scene.run / "victim", os.O_RDWR | os.O_CREAT, 0o600)
    if victim != handle:
        os.dup2(victim, handle)
    scene.spare.append(handle)


def _tensorboard(scene: Scene) -> Path:
    return scene.run / "tensorboard"


LOSING: dict[str, Callable[[Scene], object]] = {
    "the log is a directory": lambda s: _replace(s.events, Path.mkdir),
    "the log is a full device": lambda s: _replace(s.events, lambda p: p.symlink_to("/dev/full")),
    "the log is a pipe that nobody reads": lambda s: _replace(s.events, lambda p: os.mkfifo(p)),
    "the log is a link to itself": lambda s: _replace(s.events, lambda p: p.symlink_to(p.name)),
    "the log is a link into nowhere": lambda s: _replace(s.events, lambda p: p.symlink_to("no/such/folder/file")),
    "the disk of the log is full": lambda s: s.patch.setattr(os, "write", _full_for(s.events)),
    "writes come up short": lambda s: s.patch.setattr(events_module.EventLog, "_append", _raising(OSError(5, "short write"))),
    "TensorBoard's folder is a file": lambda s: (_tensorboard(s).rename(s.run / "gone"), _tensorboard(s).write_text("x")),
    "TensorBoard's library fails": lambda s: s.patch.setattr(
        s.monitor._tensorboard, "_open", _raising(ZeroDivisionError("inside the library"))
    ),
    "TensorBoard's folder was moved away": lambda s: _tensorboard(s).rename(s.run / "gone"),
    "an event of five megabytes": lambda s: s.monitor.event("huge", text="x" * 5_000_000),
    "a field without words": lambda s: s.monitor.event("odd", field=_Unspeakable()),
    "a field that holds itself": lambda s: s.monitor.event("odd", field=_endless()),
    "a metric that is no number": lambda s: s.monitor.evaluated(3, {"loss": "high"}),  # type: ignore[dict-item]
    "a report that is none": lambda s: s.monitor.saved(None, seconds=1.0, folder="x"),  # type: ignore[arg-type]
    "the account of time is a file": lambda s: (shutil.rmtree(s.run / "attempts"), (s.run / "attempts").write_text("x")),
    "the terminal line fails": lambda s: s.patch.setattr(s.monitor._terminal, "show", _raising(BrokenPipeError())),
    "the FLOP count divides by zero": lambda s: s.patch.setattr(s.monitor, "_utilisation", _raising(ZeroDivisionError())),
}  # fmt: skip

HARMLESS: dict[str, Callable[[Scene], object]] = {
    "the log was deleted": lambda s: s.events.unlink(),
    "the log was moved": lambda s: s.events.rename(s.run / "old.jsonl"),
    "the log was cut in the middle of a line": lambda s: os.truncate(s.events, s.events.stat().st_size - 7),
    "the log's handle was closed": lambda s: os.close(s.monitor.events._handle or -1),
    "the log's handle is another file's now": _steal_descriptor,
    "the account of time was deleted": lambda s: shutil.rmtree(s.run / "attempts"),
    "numbers that are none": lambda s: s.monitor.event("odd", a=float("nan"), b=[float("inf")], c={"d": -float("inf")}),
    "bytes and lone surrogates": lambda s: s.monitor.event("odd", a=b"\xff\xfe", b="\ud800", c={1: 2}, d={3, 4}),
    "the clock jumps back by a year": lambda s: s.patch.setattr(time, "time", lambda now=time.time: now() - 3e7),
    "standard error is closed": lambda s: s.patch.setattr(sys, "stderr", None),
    "nobody may write the log": lambda s: s.events.chmod(0o000),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LOSING, *HARMLESS])
def test_a_disaster_of_the_logs_leaves_the_run_complete_and_every_bit_as_it_was(
    tmp_path: Path, shards: Path, calm: Outcome, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    struck = train(tmp_path, shards, monkeypatch, {**LOSING, **HARMLESS}[name])
    monkeypatch.undo()
    assert struck.code is ExitCode.COMPLETE
    assert struck.losses == calm.losses
    assert struck.state == calm.state
    if name in LOSING:
        assert struck.dropped >= 1
    else:
        assert struck.dropped == 0
        assert read_events(tmp_path / "run" / "events.jsonl")[-1]["event"] == "ended"
    victim = tmp_path / "run" / "victim"
    assert not victim.exists() or victim.read_bytes() == b""


def test_losses_are_counted_in_the_last_event_when_the_log_recovers(
    tmp_path: Path, shards: Path, calm: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def for_two_steps(scene: Scene) -> None:
        append, left = scene.monitor.events._append, [2]

        def failing(line: bytes) -> None:
            if left[0] and json.loads(line)["event"] == "step":
                left[0] -= 1
                raise OSError(28, "no space left")
            append(line)

        scene.patch.setattr(scene.monitor.events, "_append", failing)

    struck = train(tmp_path, shards, monkeypatch, for_two_steps)
    assert (struck.losses, struck.dropped) == (calm.losses, 2)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 6, 7, 8]
    assert events[-1]["events_dropped"] == 2


def test_there_are_at_least_twelve_disasters() -> None:
    assert len(LOSING) + len(HARMLESS) >= 12
