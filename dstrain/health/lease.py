"""One job per run folder: numbered lease files that are only ever added, and a heartbeat that only its owner writes.

The second job refuses, naming the first one's host, process, job and heartbeat age. A lease whose owner is provably dead
(same machine, no such process), was an earlier start of the same SLURM job, or is silent for long (another machine) is taken
over. Held by rank 0 for the whole job.

How it works, and why a paused former owner does no harm. `lease/00000007.json` says who owned the folder in epoch 7; the
owner is the highest epoch. Taking the folder means making the next number's file, whole and exclusively (a hard link):
of several who try, the file system lets one succeed, on one machine and over NFS. Nobody ever changes or removes a file
of a higher epoch than his own, and heartbeats go to `00000007.beat`, which belongs to the owner of epoch 7 alone. So a
former owner that was stopped and goes on can neither overwrite nor remove its successor's lease, whatever instant it was
stopped at. Epochs survive the owner's leaving: its file stays, marked as released, until the next owner sweeps it.

`check` asks whether the own epoch is still the highest, immediately before a checkpoint is published. It writes a
heartbeat first: a client of a network file system that has changed a folder does not answer from its cache about it.
What is left is a stop between `check` and the rename. It is closed by the successor: before it looks for checkpoints,
it removes the staging folders (`CheckpointWriter.remove_leftovers`), so that the late rename has nothing to rename. A
rename that comes before that publishes a checkpoint that the successor then finds and resumes from: as if the old owner
had been quick. Clocks are never compared between machines: silence is what the reader itself watched for that long.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dstrain.base.errors import RunInUseError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import create_exclusively, make_directory, remove_file, write_bytes
from dstrain.health.watched_process import ProcessId, identify

FILE_NAME = "lease"
"""Entry of the run folder that holds the epochs."""
HEARTBEAT_S = 10.0
SILENT_AFTER_S = 120.0
"""Without any sign for so long, by the watching process's clock, an owner on another machine counts as dead: 12 beats."""
LOOK_EVERY_S = 1.0

_LOG = get_logger(__name__)


class RunLease:
    """Exclusive ownership of a run folder; a context manager."""

    epoch: int
    """Grows with every owner of the folder; 0 before the lease is taken."""

    def __init__(self, run_folder: Path, *, patient: bool = False) -> None:
        """Name the folder; nothing is taken yet.

        Args:
            run_folder: what is to be owned.
            patient: watch an owner on another machine even if its last heartbeat looks recent: a job that is requeued
                right after its machine died goes on when it has been silent for long enough, instead of refusing.
        """
        self._run_folder, self._folder, self._patient = run_folder, run_folder / FILE_NAME, patient
        self.epoch = 0
        process = identify(os.getpid())
        self._identity = {
            "host": socket.gethostname(),
            "machine": this_machine(),
            "pid": os.getpid(),
            "process_started": process.started if process is not None else 0,
            **_slurm_job(os.environ),
        }
        self._beats = 0
        self._beating = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLease:
        """Take the lease; may have to watch an owner on another machine for `SILENT_AFTER_S` seconds before it can.

        Raises:
            RunInUseError: a live job holds it.
            StorageError: the folder cannot be written.
        """
        make_directory(self._folder)
        known = 0
        while True:
            newest = max(known, self._newest())
            if newest:
                self._require_free(newest)
            self.epoch = newest + 1
            if create_exclusively(self._file(self.epoch), self._words(released=False)):
                if self._newest() == self.epoch:
                    break
                remove_file(self._file(self.epoch))  # an old view of the folder: others are epochs ahead
            known = self.epoch
        try:
            self._beat_once()
            self._sweep()
        except StorageError:
            remove_file(self._file(self.epoch))
            raise
        self._thread = threading.Thread(target=self._beat, name="dstrain-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * HEARTBEAT_S)
        if self._file(self.epoch).exists():  # not after the whole folder was removed on purpose
            try:
                write_bytes(self._file(self.epoch), self._words(released=True))
                remove_file(self._beat_file(self.epoch))
            except StorageError as fault:
                _LOG.warning("lease not released; it ends with this process: %s", fault)

    def check(self) -> None:
        """Ask whether the folder is still this job's; called immediately before a checkpoint is published.

        Raises:
            RunInUseError: another job has taken it over meanwhile, or somebody removed the lease.
            StorageError: it cannot be found out.
        """
        try:
            self._beat_once()
        except StorageError as fault:
            _LOG.warning("heartbeat not written before publishing: %s", fault)
        newest = self._newest()
        if newest > self.epoch:
            owner = _parse(_read(self._file(newest)) or b"")
            raise RunInUseError(
                f"{self._run_folder}: taken over by process {owner.get('pid')} on {owner.get('host')} "
                f"(epoch {newest}, this job had {self.epoch}): this job must not write there any more"
            )
        if newest < self.epoch:
            raise RunInUseError(
                f"{self._run_folder}: {self._file(self.epoch).name} was removed from {FILE_NAME}/, so another job may own the "
                "folder: start again, and leave that folder alone"
            )

    def _require_free(self, epoch: int) -> None:
        """Return when the epoch's owner has left or is dead."""
        data = _read(self._file(epoch))
        if data is None:  # swept meanwhile: somebody is ahead, and the exclusive link or the look behind it finds him
            return
        owner = _parse(data)
        if not owner or owner.get("released"):
            return
        if _is_an_earlier_start(owner, self._identity):
            alive = False
        elif owner.get("machine") == this_machine():
            alive = ProcessId(owner["pid"], owner["process_started"]).is_alive
        elif not self._patient and abs(self._heartbeat_age_s(epoch)) < SILENT_AFTER_S:
            alive = True  # by clocks that may differ: good enough to leave it alone, never to take it away
        else:
            alive = self._gives_sign(epoch, owner)
        if alive:
            self._refuse(epoch, owner)
        _LOG.info(
            "taking over the run folder from process %s on %s, which is gone", owner.get("pid"), owner.get("host")
        )

    def _refuse(self, epoch: int, owner: dict[str, Any]) -> None:
        job = f", job {owner['job']}" if owner.get("job") else ""
        age = max(0.0, self._heartbeat_age_s(epoch))
        raise RunInUseError(
            f"{self._run_folder}: in use by process {owner.get('pid')} on {owner.get('host')}{job} "
            f"(heartbeat {age:.0f} s ago): wait for it, stop it, or set another run_folder"
        )

    def _heartbeat_age_s(self, epoch: int) -> float:
        """By two machines' clocks; negative when the owner's is ahead."""
        try:
            beat = _parse(_read(self._beat_file(epoch)) or _read(self._file(epoch)) or b"")
            return time.time() - float(beat.get("time", 0.0))
        except (StorageError, ValueError, TypeError):
            return time.time()

    def _gives_sign(self, epoch: int, owner: dict[str, Any]) -> bool:
        """Watch an owner that cannot be looked up here, until something of it changes or it was silent for long."""
        _LOG.info(
            "process %s on %s held the run folder: watching up to %.0f s for a heartbeat",
            owner.get("pid"), owner.get("host"), SILENT_AFTER_S,
        )  # fmt: skip
        first, begun = self._signs(epoch), time.monotonic()
        while time.monotonic() - begun < SILENT_AFTER_S:
            self._stop.wait(LOOK_EVERY_S)
            if self._signs(epoch) != first:
                found = _parse(_read(self._file(epoch)) or b"")
                return bool(found) and not found.get("released")
        return False

    def _signs(self, epoch: int) -> list[bytes | str | None]:
        signs: list[bytes | str | None] = []
        for path in (self._file(epoch), self._beat_file(epoch)):
            try:
                signs.append(_read(path))
            except StorageError as error:  # like any other sign, it changes or stays
                signs.append(str(error))
        return signs

    def _newest(self) -> int:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise StorageError(f"{self._folder}: cannot be read: {error}") from error
        return max((int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdecimal()), default=0)

    def _sweep(self) -> None:
        """Remove what earlier epochs left; only the last owner's file, ours, is needed for the count to go on."""
        for path in list(self._folder.iterdir()):
            if path.stem.isdecimal() and int(path.stem) < self.epoch:
                remove_file(path)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._beat_once()
            except StorageError as error:
                _LOG.warning("heartbeat not written: %s", error)

    def _beat_once(self) -> None:
        with self._beating:
            self._beats += 1
            data = json.dumps({"beats": self._beats, "time": time.time()}).encode()
            write_bytes(self._beat_file(self.epoch), data)

    def _words(self, *, released: bool) -> bytes:
        return json.dumps({**self._identity, "epoch": self.epoch, "released": released, "time": time.time()}).encode()

    def _file(self, epoch: int) -> Path:
        return self._folder / f"{epoch:08d}.json"

    def _beat_file(self, epoch: int) -> Path:
        return self._folder / f"{epoch:08d}.beat"


def this_machine() -> str:
    """Names the set of processes that process numbers are unique in: this start of this kernel and this PID namespace.

    Host names are no proof: containers on two machines may share one, and a machine that started again keeps its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _slurm_job(environment: Mapping[str, str]) -> dict[str, Any]:
    """Which start of which SLURM job this is; an empty job outside of SLURM."""
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return {
        "cluster": environment.get("SLURM_CLUSTER_NAME", ""),
        "job": environment.get("SLURM_JOB_ID", ""),
        "restart": int(restart) if restart.isdecimal() else 0,
    }


def _is_an_earlier_start(owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether SLURM has requeued the owner's job to make this one of it.

    It starts a job again only when it has ended the start before, or has given up its node. What still runs there, cut
    off, publishes nothing any more: its epoch is over.
    """
    same = bool(mine["job"]) and all(owner.get(name) == mine[name] for name in ("cluster", "job"))
    return same and owner["restart"] < mine["restart"]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error


def _parse(data: bytes) -> dict[str, Any]:
    """The fields of a file; empty when it cannot be one of ours, which is as good as dead."""
    try:
        found = json.loads(data)
        numbers = {name: int(found.get(name, 0)) for name in ("pid", "process_started", "restart")}
        return {**found, **numbers}
    except (ValueError, TypeError, AttributeError):
        return {}
