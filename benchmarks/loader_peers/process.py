"""One measurement of one peer, in a fresh process: `python process.py JOB.json`; the answer goes to the job's `out`.

Needs only the standard library, NumPy and the peer, so that a peer may live in an environment of its own. CPU time is user
and system time of the whole process tree. Memory is the proportional share (PSS) of the tree, so that pages shared by
forked workers count once.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from contract import BasePeer, Settings
from corpus import load

TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    names = ("variant", "form", "row_length", "batch", "workers", "rank", "world", "seed")
    settings = Settings(
        **{name: job[name] for name in names if name in job}, folder=Path(job["folder"]), corpus=Path(job["corpus"])
    )
    module = importlib.import_module(f"peer_{job['peer']}")
    if job["task"] in ("speed", "first"):  # importing a library is no part of opening its data
        for name in module.IMPORTS:
            importlib.import_module(name)
    answer = {"check": check, "convert": convert, "speed": speed, "walk": walk, "first": first}[job["task"]](
        module, settings, job
    )
    Path(job["out"]).write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # some peers keep threads or workers that would hold up a normal exit; nothing here needs a clean one


def check(module: Any, settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata.version(name) for name in module.NEEDS}


def convert(module: Any, settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    corpus = load(settings.corpus)
    started = time.perf_counter()
    settings.folder.mkdir(parents=True)
    module.convert(corpus, settings.folder, settings)
    size = sum(f.stat().st_size for f in settings.folder.rglob("*") if f.is_file())
    return {"bytes": size, "tokens": len(corpus.tokens), "seconds": time.perf_counter() - started}


def speed(module: Any, settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """First batch with a cold page cache, then a second to warm up, then the timed stretch, epoch after epoch."""
    forget_pages(settings.folder)
    started = time.perf_counter()
    peer: BasePeer = module.Peer(settings)
    peer.open(None)
    stream = _endless(peer)
    next(stream)
    first_s = time.perf_counter() - started
    _run(peer, stream, seconds=job["warmup_s"])
    if peer.caches_epoch:
        stream.close()
        stream = None
    tokens, wall, cpu = _run(peer, stream, seconds=job["seconds"])
    return {"first_s": first_s, "tokens": tokens, "wall_s": wall, "cpu_s": cpu, **memory()}


def first(module: Any, settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds from opening to the first batch, from a checkpoint's state; pages forgotten as at a cold start."""
    state = json.loads(Path(job["state"]).read_text())
    forget_pages(settings.folder)
    started, cpu = time.perf_counter(), cpu_seconds()
    peer: BasePeer = module.Peer(settings)
    peer.open(state)
    next(iter(peer.batches()))
    return {"first_s": time.perf_counter() - started, "cpu_s": cpu_seconds() - cpu}


def walk(module: Any, settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Consume batches (all that are left without `stop_after`), note the numbers seen, and keep the state."""
    if settings.world > 1:
        _join(settings)
    peer: BasePeer = module.Peer(settings)
    peer.open(json.loads(Path(job["state"]).read_text()) if job.get("state") else None)
    stop = job.get("stop_after")
    if job.get("half"):
        stop = max(1, (peer.length() or job["half"]) // 2)
    numbers: list[int] = []
    done = 0
    if stop != 0:
        for batch in peer.batches():
            done += 1
            if job.get("count"):
                numbers += peer.numbers(batch)
            if done == stop:
                break
    if job.get("keep"):
        Path(job["keep"]).write_text(json.dumps(peer.state(done)))
    return {"batches": done, "numbers": numbers}


def _join(settings: Settings) -> None:
    """A gloo group, as every training process has: some peers learn their rank from it."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=settings.rank, world_size=settings.world)


def _endless(peer: BasePeer) -> Any:
    while True:
        yield from peer.batches()


def _run(peer: BasePeer, stream: Any, *, seconds: float) -> tuple[int, float, float]:
    """Tokens, wall and CPU seconds of a stretch; without a stream, of whole epochs from their beginning."""
    tokens, started, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - started < seconds:
        for batch in [next(stream)] if stream is not None else peer.batches():
            tokens += peer.tokens(batch)
    return tokens, time.perf_counter() - started, cpu_seconds() - cpu


def forget_pages(folder: Path) -> None:
    """Drop the files' clean pages from the page cache; no privilege is needed for one's own files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def cpu_seconds() -> float:
    """User and system time of this process, its living descendants and those it has waited for."""
    own, reaped = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    living = sum(_stat_seconds(pid) for pid in descendants(os.getpid()))
    return own.ru_utime + own.ru_stime + reaped.ru_utime + reaped.ru_stime + living


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def _stat_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICK  # utime, stime, cutime, cstime


def memory() -> dict[str, float]:
    """MiB: proportional share of the tree now, and the sum of each process's highest resident size."""
    pids = [os.getpid(), *descendants(os.getpid())]
    return {"pss_mib": sum(_field(p, "smaps_rollup", "Pss:") for p in pids) / 1024,
            "peak_mib": sum(_field(p, "status", "VmHWM:") for p in pids) / 1024}  # fmt: skip


def _field(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
