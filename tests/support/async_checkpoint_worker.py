"""One rank of an asynchronous save: the scenarios of tests/dist/test_async_checkpoint.py, one process group for all of them.

Storage is held up and made to fail by operations of this process; nothing sleeps to let something else happen.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch import Tensor

from dstrain.base.control import ControlPlane
from dstrain.base.errors import CheckpointError, ExitCode, RunInUseError
from dstrain.base.file_operations import FileOperations, operations_replaced
from dstrain.base.world import world_from_environment
from dstrain.checkpoint.background import SaveThread
from dstrain.checkpoint.manifest import STATES, Fragment, model_fingerprint
from dstrain.checkpoint.outcome import SaveOutcome
from dstrain.checkpoint.writer import CheckpointConfig, CheckpointWriter
from dstrain.train.engine import start_processes, stop_processes
from tests.support.matrix_worker import STAGES, build

ELEMENTS = 300_001


def whole_state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {state: torch.randn(ELEMENTS, generator=generator) for state in STATES}


class HeldUp(FileOperations):
    """Writes of tensor files wait until they are let through."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def write(self, handle: int, data: memoryview) -> int:
        if data.nbytes > 100_000:
            self.reached.set()
            self.open.wait()
        return super().write(handle, data)


class Failing(FileOperations):
    """The first write of tensors fails, or does something worse."""

    def __init__(self, fault: int | Callable[[], None]) -> None:
        self.fault, self.done = fault, False

    def write(self, handle: int, data: memoryview) -> int:
        if data.nbytes > 100_000 and not self.done:
            self.done = True
            if isinstance(self.fault, int):
                raise OSError(self.fault, os.strerror(self.fault))
            self.fault()
        return super().write(handle, data)


class Rank:
    """A rank's share of a state, and its writer."""

    def __init__(self, control: ControlPlane, folder: Path, **config: Any) -> None:
        self.control, self.world, self.folder = control, control.world, folder
        self.owner: Callable[[], None] = lambda: None
        self.published: list[int] = []
        self.writer = CheckpointWriter(
            folder, config=CheckpointConfig(every_steps=1, **config), control=control, check_owner=lambda: self.owner(),
            on_published=lambda p: self.published.append(p.step),
        )  # fmt: skip
        self.tensors: list[Tensor] = []

    def start(self, step: int, **options: Any) -> None:
        size, rank = self.world.size, self.world.rank
        a, b = rank * ELEMENTS // size, (rank + 1) * ELEMENTS // size
        own = [Fragment("w", state, a, tensor[a:b].clone()) for state, tensor in whole_state(step).items()]
        self.tensors = [f.tensor for f in own]
        parameters = {"w": [ELEMENTS]}
        manifest = {
            "step": step, "world_size": size, "zero_stage": 1, "precision": "fp32", "stage": "pretrain",
            "parameters": parameters, "model_fingerprint": model_fingerprint(parameters), "architecture": {}, "state": {},
            "loader": {}, "optimizer": {"step": step}, "states": STATES,
        }  # fmt: skip
        self.writer.start(own, manifest, config_yaml="a: 1\n", tokenizer=None, **options)

    def save(self, step: int) -> SaveOutcome:
        self.start(step)
        return self.settle()

    def settle(self) -> SaveOutcome:
        outcome = self.writer.settle()
        assert outcome is not None
        assert not self.writer.in_flight
        plain = {**outcome.to_plain(), "first_seen": True}
        assert self.control.gather_json(plain) == [plain] * self.world.size, "the same end on every rank"
        return outcome

    def names(self) -> list[str]:
        self.control.barrier()
        found = sorted(p.name for p in self.folder.iterdir())
        self.control.barrier()
        return found

    def is_last(self) -> bool:
        return self.world.rank == self.world.size - 1


def moving(rank: Rank) -> None:
    """Tensors change as soon as `start` returns, while every write is still held up."""
    with operations_replaced(HeldUp()) as held:
        rank.start(1)
        for tensor in rank.tensors:
            tensor.fill_(-7.0)
        held.reached.wait()  # type: ignore[attr-defined]
        assert rank.writer.poll() is None
        assert not rank.writer.failed()
        assert rank.writer.in_flight
        held.open.set()  # type: ignore[attr-defined]
        outcome = rank.settle()
    assert outcome.published is not None
    assert outcome.published.verified
    assert rank.writer.settle() is None
    assert rank.published == ([1] if rank.world.is_first else [])


def polled(rank: Rank) -> None:
    """Each rank is shown the end of its own part, and the agreed end is told apart from it."""
    rank.start(1)
    shown = None
    while shown is None:
        shown = rank.writer.poll()
        time.sleep(0.005)
    assert shown.own_part == (not rank.world.is_first)
    assert rank.writer.poll() is None, "shown once"
    outcome = rank.settle()
    assert outcome.first_seen == (not rank.world.is_first)


def pressed(rank: Rank) -> None:
    """A second save waits for the first, and the first one's end is not lost."""
    with operations_replaced(HeldUp()) as held:
        rank.start(1)
        held.reached.wait()  # type: ignore[attr-defined]
        assert not (rank.folder / "step-00000001").exists()
        threading.Timer(0.3, held.open.set).start()  # type: ignore[attr-defined]
        rank.start(2)
        assert (rank.folder / "step-00000001").exists()
    first = rank.writer.poll()
    assert first is not None
    assert (first.step, first.failed) == (1, False)
    assert rank.settle().step == 2


def one_fails(rank: Rank) -> None:
    """The last rank's disk fails: everybody is told its words, nothing is left, the next save works."""
    assert not rank.save(1).failed
    before = rank.names()
    with operations_replaced(Failing(errno.EIO) if rank.is_last() else FileOperations()):
        rank.start(2)
        while not (rank.writer.failed() or not (rank.is_last() or rank.world.is_first)):
            time.sleep(0.005)
        outcome = rank.settle()
    assert outcome.failed
    assert f"checkpoint of step 2 was not saved: rank {rank.world.size - 1}: " in outcome.error
    assert "input/output error" in outcome.error
    assert isinstance(outcome.fault(), CheckpointError)
    assert not rank.writer.failed(), "agreed on"
    assert rank.names() == before
    assert not rank.save(3).failed


def full(rank: Rank) -> None:
    """The last rank finds no room; rank 0 deletes what retention allows, and the rank tries once more."""
    for step in (1, 2):
        assert not rank.save(step).failed
    with operations_replaced(Failing(errno.ENOSPC) if rank.is_last() else FileOperations()):
        assert not rank.save(3).failed
    assert rank.names() == ["step-00000002", "step-00000003"]


def silent(rank: Rank) -> None:
    """The last rank's disk holds its thread: the deadline ends the save and names it, and its buffer is not touched again."""
    assert not rank.save(1).failed
    with operations_replaced(HeldUp() if rank.is_last() else FileOperations()) as held:
        rank.start(2)
        outcome = rank.settle()
        assert f"rank {rank.world.size - 1} did not report within 1 s" in outcome.error
        again = rank.save(3)
        assert f"rank {rank.world.size - 1}: the write of step 2 still hangs" in again.error
        if rank.is_last():
            held.open.set()  # type: ignore[attr-defined]
            while rank.writer._thread is not None and rank.writer._thread.holds_the_buffer:
                time.sleep(0.005)
    assert rank.names() == ["step-00000001"]


def fenced(rank: Rank) -> None:
    """The run belongs to another job by now: not published, and everybody knows that it is over."""

    def taken() -> None:
        raise RunInUseError("run: taken over by job 5 on host b")

    assert not rank.save(1).failed
    rank.owner = taken
    outcome = rank.save(2)
    assert outcome.exit_code == ExitCode.RUN_IN_USE
    assert isinstance(outcome.fault(), RunInUseError)
    assert rank.names() == ["step-00000001"]


def at_once(rank: Rank) -> None:
    """`asynchronous: false` has an end when `start` returns."""
    rank.start(1)
    assert not rank.writer.in_flight
    outcome = rank.writer.poll()
    assert outcome is not None
    assert outcome.published is not None
    assert rank.writer.settle() is None


def closed(rank: Rank) -> None:
    """`close` gives up what does not end, and leaves nothing behind."""
    with operations_replaced(HeldUp()) as held:
        rank.start(1)
        held.reached.wait()  # type: ignore[attr-defined]
        thread = rank.writer._thread
        rank.writer.close(wait_s=0.0)
        assert not rank.writer.in_flight
        held.open.set()  # type: ignore[attr-defined]
    assert thread is not None
    thread.wait(60)
    assert rank.names() == []


def killed(rank: Rank) -> None:
    """The last rank dies in the middle of its write."""
    assert not rank.save(1).failed
    death = Failing(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with operations_replaced(death if rank.is_last() else FileOperations()):
        rank.start(2)
        rank.settle()


# A base model's proportions, narrower: tensors of every size from 1 to 8 million elements.
BALANCED = {
    "model_type": "bert", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024,
    "max_position_embeddings": 512,
}  # fmt: skip


def balance(control: ControlPlane, stage: int) -> None:
    """What each rank would write of a BERT is within 10 % of an equal share, and all of it is written."""
    _, state = build(control, stage=stage, precision="bf16", seed=1, shape=BALANCED, vocab_size=30_522)
    world = control.world
    owned = sum(f.tensor.numel() for f in state.owned(rank=world.rank, world_size=world.size))
    shares = control.gather_json(owned)
    total = sum(math.prod(shape) for shape in state.shapes.values()) * len(STATES)
    assert sum(shares) == total, (stage, shares)
    assert max(shares) <= 1.1 * total / world.size, (stage, shares)
    print(f"balanced {stage} {max(shares) * world.size / total:.4f}", flush=True)


SCENARIOS: dict[str, tuple[Callable[[Rank], None], dict[str, Any]]] = {
    f.__name__: (f, options)
    for f, options in (
        (moving, {}), (polled, {}), (pressed, {}), (one_fails, {}), (full, {"keep_last": 2}), (silent, {"timeout_s": 1.0}),
        (fenced, {}), (at_once, {"asynchronous": False}), (closed, {}),
    )
}  # fmt: skip


def main(root: Path, chosen: str) -> None:
    torch.set_num_threads(1)
    SaveThread.grace_s = 1.0
    world = world_from_environment()
    control = start_processes(world, device="cpu", timeout_s=60)
    if chosen == "killed":
        killed(Rank(control, root / "killed"))
    for stage in STAGES if chosen == "balance" else ():
        balance(control, stage)
    for name, (scenario, options) in SCENARIOS.items():
        if chosen != "all":
            break
        scenario(Rank(control, root / name, **options))
        print(f"passed {name}", flush=True)
    stop_processes(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
