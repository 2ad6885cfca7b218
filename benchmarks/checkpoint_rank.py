"""One rank of one measurement of `checkpoint.py`: save a state a few times by one system, then load it with cold pages.

Every system gets the same tensors: fp32 weights and two moments of a model made of BERT-base layers, each rank its own share, as
ZeRO leaves it. A system that does not sync its files has them synced by us, and that counts into "durable" but not into the stall.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

STATES = ("fp32", "exp_avg", "exp_avg_sq")
LAYER = (768 * 768, 768 * 768, 768 * 768, 768 * 768, 768 * 3072, 768 * 3072, 3072, *[768] * 9)
Figures = dict[str, Any]


def parameters_of(elements: int) -> dict[str, int]:
    """Sizes of a rank's tensors, layers of BERT-base, `elements` in all."""
    sizes: dict[str, int] = {}
    left = elements
    while left:
        n = min(left, LAYER[len(sizes) % len(LAYER)])
        sizes[f"layer{len(sizes) // len(LAYER)}.{len(sizes) % len(LAYER)}"] = n
        left -= n
    return sizes


class System:
    """Saves and loads a rank's share. `save` returns (seconds until it came back, seconds until it was durable)."""

    def __init__(self, job: Figures, state: dict[str, dict[str, Tensor]], rank: int, world: int) -> None:
        self.job, self.state, self.rank, self.world = job, state, rank, world

    def save(self, folder: Path) -> tuple[float, float]:
        raise NotImplementedError

    def load(self, folder: Path) -> dict[str, float]:
        """Seconds by kind of load."""
        raise NotImplementedError

    def flat(self) -> dict[str, Tensor]:
        return {f"r{self.rank}|{n}|{s}": t for n, states in self.state.items() for s, t in states.items()}

    def close(self) -> None:
        pass


class Raw(System):
    """What the disk takes: one buffer of the same size, written and synced."""

    def save(self, folder: Path) -> tuple[float, float]:
        data = memoryview(self.buffer().numpy()).cast("B")
        started = time.monotonic()
        handle = os.open(folder / f"raw-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for at in range(0, len(data), 8 << 20):
            piece = data[at : at + (8 << 20)]
            while piece:
                piece = piece[os.write(handle, piece) :]
        returned = time.monotonic()
        os.fsync(handle)
        os.close(handle)
        sync_folder(folder)
        return returned - started, time.monotonic() - started

    def buffer(self) -> Tensor:
        if not hasattr(self, "_buffer"):
            self._buffer = torch.cat([t for states in self.state.values() for t in states.values()])
        return self._buffer

    def load(self, folder: Path) -> dict[str, float]:
        started = time.monotonic()
        with open(folder / f"raw-{self.rank}", "rb", buffering=0) as file:
            view = memoryview(self.buffer().numpy()).cast("B")
            at = 0
            while at < len(view):
                at += file.readinto(view[at : at + (8 << 20)]) or 0
        return {"load": time.monotonic() - started}


class Dstrain(System):
    def __init__(self, job: Figures, state: dict[str, dict[str, Tensor]], rank: int, world: int) -> None:
        super().__init__(job, state, rank, world)
        from dstrain.base.control import ControlPlane
        from dstrain.base.world import World
        from dstrain.checkpoint.config import CheckpointConfig
        from dstrain.checkpoint.manifest import Fragment, model_fingerprint
        from dstrain.checkpoint.writer import CheckpointWriter

        self.control = ControlPlane(World(rank=rank, size=world))
        self.fragments = [Fragment(f"r{rank}.{n}", s, 0, t) for n, states in state.items() for s, t in states.items()]
        shapes = self.control.gather_json({f"r{rank}.{n}": [len(states["fp32"])] for n, states in state.items()})
        self.parameters = {name: shape for part in shapes for name, shape in part.items()}
        self.manifest = {
            "world_size": world, "zero_stage": 1, "precision": "fp32", "stage": "pretrain", "parameters": self.parameters,
            "model_fingerprint": model_fingerprint(self.parameters), "architecture": {}, "state": {}, "loader": {}, "optimizer": {},
            "states": STATES,
        }  # fmt: skip
        config = CheckpointConfig(keep_last=100, asynchronous=job["asynchronous"], verify_after_write=job["read_back"])
        self.folder = Path(job["folder"]) / "dstrain"
        self.writer = CheckpointWriter(self.folder, config=config, control=self.control)

    def save(self, folder: Path) -> tuple[float, float]:
        step = int(folder.name)
        started = time.monotonic()
        self.writer.start(self.fragments, {**self.manifest, "step": step}, config_yaml="", tokenizer=None)
        returned = time.monotonic() - started
        outcome = self.writer.settle() or self.writer.poll()
        while self.writer.poll():
            pass
        assert outcome is not None
        assert outcome.published is not None, outcome.error
        # Until the rename is synced, by the thread that did it: our own waking up comes later.
        return returned, max(returned, outcome.published.seconds["total"])

    def load(self, folder: Path) -> dict[str, float]:
        from dstrain.checkpoint.reader import Checkpoint, newest_valid

        seconds = {}
        drop_pages(self.folder)
        self.control.barrier()
        started = time.monotonic()
        Checkpoint(self.folder / f"step-{int(folder.name):08d}").load_into(self.fragments)
        seconds["load, not verified"] = time.monotonic() - started
        self.control.barrier()
        drop_pages(self.folder)
        self.control.barrier()
        started = time.monotonic()
        found = self.control.from_first(str(newest_valid(self.folder).checkpoint.folder) if self.rank == 0 else "")  # type: ignore[union-attr]
        Checkpoint(Path(found)).load_into(self.fragments)
        seconds["load"] = time.monotonic() - started
        return seconds

    def close(self) -> None:
        self.writer.close()


class TorchSave(System):
    def save(self, folder: Path) -> tuple[float, float]:
        started = time.monotonic()
        torch.save(self.flat(), folder / f"rank-{self.rank}.pt")
        returned = time.monotonic() - started
        sync_tree(folder, only=f"rank-{self.rank}.pt")
        return returned, time.monotonic() - started

    def load(self, folder: Path) -> dict[str, float]:
        started = time.monotonic()
        found = torch.load(folder / f"rank-{self.rank}.pt", weights_only=True)
        for name, tensor in self.flat().items():
            tensor.copy_(found[name])
        return {"load": time.monotonic() - started}


class Dcp(System):
    """torch.distributed.checkpoint as its tutorials use it; syncs its files itself."""

    def save(self, folder: Path) -> tuple[float, float]:
        import torch.distributed.checkpoint as dcp

        started = time.monotonic()
        dcp.save(self.flat(), checkpoint_id=folder)
        returned = time.monotonic() - started
        sync_folder(folder)
        return returned, time.monotonic() - started

    def load(self, folder: Path) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        started = time.monotonic()
        dcp.load(self.flat(), checkpoint_id=folder)
        return {"load": time.monotonic() - started}


class DcpAsync(Dcp):
    def __init__(self, job: Figures, state: dict[str, dict[str, Tensor]], rank: int, world: int) -> None:
        super().__init__(job, state, rank, world)
        self.stager: Any = None
        if job["kept_staging"]:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            # The combination that runs without an accelerator; it keeps its copies and uses them again.
            options = StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
            self.stager = DefaultStager(options)

    def save(self, folder: Path) -> tuple[float, float]:
        import torch.distributed.checkpoint as dcp

        started = time.monotonic()
        future: Any = dcp.async_save(self.flat(), checkpoint_id=folder, async_stager=self.stager)
        returned = time.monotonic() - started
        future.result()
        sync_folder(folder)
        return returned, time.monotonic() - started


class Sum(torch.nn.Module):
    """Parameters of given sizes, and something to differentiate."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        for name, n in sizes.items():
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.rand(n)))

    def forward(self) -> Tensor:
        return torch.stack([p.mean() for p in self.parameters()]).sum()


class DeepSpeed(System):
    """ZeRO-1 in fp32. Its files hold the weights twice (module and fp32 partitions): more bytes for the same state."""

    def __init__(self, job: Figures, state: dict[str, dict[str, Tensor]], rank: int, world: int) -> None:
        super().__init__(job, {}, rank, world)
        import deepspeed

        deepspeed.utils.logging.logger.setLevel("ERROR")
        sizes = parameters_of(sum(len(states["fp32"]) for states in state.values()) * world)
        model = Sum(sizes)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters()), dist_init_required=False,
            config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
        )  # fmt: skip
        self.engine.backward(self.engine())
        self.engine.step()

    def save(self, folder: Path) -> tuple[float, float]:
        started = time.monotonic()
        self.engine.save_checkpoint(str(folder), tag="t")
        returned = time.monotonic() - started
        if self.rank == 0:
            sync_tree(folder)
        dist.barrier()
        return returned, time.monotonic() - started

    def load(self, folder: Path) -> dict[str, float]:
        started = time.monotonic()
        path, _ = self.engine.load_checkpoint(str(folder), tag="t")
        assert path
        return {"load": time.monotonic() - started}


SYSTEMS: dict[str, type[System]] = {
    "raw": Raw, "dstrain": Dstrain, "torch": TorchSave, "dcp": Dcp, "dcp_async": DcpAsync, "deepspeed": DeepSpeed,
}  # fmt: skip


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(handle)
    os.close(handle)


def sync_tree(folder: Path, *, only: str = "") -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and only in path.name:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(path)


def drop_pages(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def slowest(figures: Figures, world: int) -> Figures:
    """Each figure of the slowest rank."""
    if world == 1:
        return figures
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, figures)
    return {key: max(part[key] for part in parts) for key in figures}


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def timed(system: System, folder: Path, world: int, rank: int) -> Figures:
    """One save into a new folder, with nothing else on its way to the disk."""
    if rank == 0:
        folder.mkdir(parents=True)
        os.sync()
    gc.collect()
    barrier(world)
    stall, durable = system.save(folder)
    return slowest({"stall_s": stall, "durable_s": durable}, world)


def measure(job: Figures, rank: int, world: int) -> Figures:
    elements = int(job["gigabytes"] * 1e9 / 4 / len(STATES) / world)
    generator = torch.Generator().manual_seed(rank)
    state = {
        name: {s: torch.rand(n, generator=generator) for s in STATES} for name, n in parameters_of(elements).items()
    }
    system = SYSTEMS[job["system"]](job, state, rank, world)
    root = Path(job["folder"])
    ours = root / "dstrain"
    saves: list[Figures] = []
    for number in range(job["saves"] + 1):
        saves.append(timed(system, root / f"{number + 1}", world, rank))
        last = root / f"{number + 1}"
        if rank == 0 and number < job["saves"]:
            shutil.rmtree(last)
            shutil.rmtree(ours, ignore_errors=True)
        barrier(world)
    size = size_of(ours if job["system"] == "dstrain" else last)
    barrier(world)
    if rank == 0:
        os.sync()
        drop_pages(last)
    barrier(world)
    loads = slowest(system.load(last), world)
    system.close()
    return {"first": saves[0], "saves": saves[1:], "loads": loads, "size_bytes": size}


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    call: Callable[[Figures, int, int], Figures] = measure
    result = call(job, rank, world)
    if rank == 0:
        Path(job["out"]).write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # some peers' threads outlive the work


if __name__ == "__main__":
    main(Path(sys.argv[1]))
