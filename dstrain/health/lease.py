"""One job per run folder: a lease file with the owner's identity and a heartbeat.

The second job refuses, naming the first one's host, process, job and heartbeat age. A lease whose owner is provably dead
(same host, no such process) or silent for long (another host) is taken over. Held by rank 0 for the whole job.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from dstrain.base.errors import RunInUseError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.storage import make_directory, write_json

FILE_NAME = "lease.json"
HEARTBEAT_S = 10.0
SILENT_AFTER_S = 120.0
"""Heartbeat age from which an owner on another host counts as dead: twelve missed beats."""

_UNREADABLE: dict[str, Any] = {"host": "", "pid": 0, "heartbeat": 0.0}  # as good as dead
_LOG = get_logger(__name__)


class RunLease:
    """Exclusive ownership of a run folder; a context manager."""

    def __init__(self, run_folder: Path) -> None:
        """Name the folder; nothing is taken yet."""
        self._path = run_folder / FILE_NAME
        self._identity = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "nonce": uuid.uuid4().hex,
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLease:
        """Take the lease.

        Raises:
            RunInUseError: a live job holds it.
            StorageError: the folder cannot be written.
        """
        make_directory(self._path.parent)
        while not self._create():
            owner = self._read()
            if owner is None:
                continue
            if not _is_dead(owner):
                age = time.time() - owner["heartbeat"]
                job = f", job {owner['job']}" if owner.get("job") else ""
                raise RunInUseError(
                    f"{self._path.parent}: in use by process {owner.get('pid')} on {owner.get('host')}{job} "
                    f"(heartbeat {age:.0f} s ago): wait for it, stop it, or set another run_folder"
                )
            self._take_over(owner)
        self._thread = threading.Thread(target=self._beat, name="dstrain-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * HEARTBEAT_S)
        owner = self._read()
        if owner is not None and owner.get("nonce") == self._identity["nonce"]:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RunInUseError when another job has taken the folder over meanwhile (a paused owner must not publish)."""
        owner = self._read()
        if owner is not None and owner.get("nonce") != self._identity["nonce"]:
            raise RunInUseError(f"{self._path.parent}: taken over by process {owner.get('pid')} on {owner.get('host')}")

    def _create(self) -> bool:
        data = json.dumps({**self._identity, "heartbeat": time.time()}).encode()
        temporary = self._path.with_name(f".{FILE_NAME}.{self._identity['nonce']}")
        try:
            temporary.write_bytes(data)
            os.link(temporary, self._path)  # atomic and exclusive, with the content already in it
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error}") from None
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _take_over(self, owner: dict[str, Any]) -> None:
        _LOG.info(
            "taking over the run folder from process %s on %s, which is gone", owner.get("pid"), owner.get("host")
        )
        grave = self._path.with_name(f".{FILE_NAME}.dead-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(self._path, grave)
            found = _parse(grave.read_bytes())
            if found.get("nonce") != owner.get("nonce"):  # somebody was faster: give it back
                os.link(grave, self._path)
        except OSError:
            pass
        finally:
            grave.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            return _parse(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError:
            return _UNREADABLE

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                owner = self._read()
                if owner is not None and owner.get("nonce") == self._identity["nonce"]:
                    write_json(self._path, {**self._identity, "heartbeat": time.time()})
            except StorageError as error:
                _LOG.warning("heartbeat not written: %s", error)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(data)
        numbers = {name: float(owner.get(name, 0)) for name in ("heartbeat", "process_started")}
        return {**owner, **numbers, "pid": int(owner.get("pid", 0))}
    except (ValueError, TypeError, AttributeError):
        return _UNREADABLE


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname():
        try:
            process = psutil.Process(owner["pid"])
            same = abs(process.create_time() - owner["process_started"]) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return True
    return bool(time.time() - owner["heartbeat"] > SILENT_AFTER_S)
