"""The rank's side of the watchdog: settings, the heartbeat, a place for stacks, and the process that watches.

The watching is done by `health.sidecar` in a process of its own, because a rank that holds the interpreter's lock or is
stopped cannot watch itself. When the sidecar is killed, the rank starts another one, three times at most, and then goes on
unwatched with a warning. Reacts to nothing itself.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import PeerGoneError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.world import World
from dstrain.health.heartbeat import Ended, Heartbeat
from dstrain.health.incidents import HealthFolder, job_name
from dstrain.health.phase_budgets import PhaseBudgets
from dstrain.health.sidecar_settings import STACKS_SIGNAL, SidecarSettings
from dstrain.health.watched_process import identify

SIDECARS_AT_MOST = 4
_GOODBYE_S = 5.0
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
_LOG = get_logger(__name__)


class WatchdogConfig(Config):
    """How long a rank may stay in a phase before it counts as hung, and what happens then."""

    enabled: bool = True
    """Whether a watchdog process stands beside every rank."""
    factor: float = Field(default=5.0, ge=2.0)
    """A step may last this many times the median of recent steps (of the longest so far, until three are known); other phases
    this many times their longest stay so far."""
    min_step_budget_s: float = Field(default=30.0, gt=0.0)
    """Seconds that a step may always last, however short its median."""
    first_step_s: float = Field(default=1800.0, gt=0.0)
    """Seconds for the first step of a process, which builds kernels, buffers and connections."""
    start_up_s: float = Field(default=1800.0, gt=0.0)
    """Seconds to build model and data; indexing a large remote dataset takes minutes."""
    rendezvous_s: float = Field(default=900.0, gt=0.0)
    """Seconds to find the other ranks; more than the process group's own timeout, which has the better message."""
    restore_s: float = Field(default=1800.0, gt=0.0)
    """Seconds to read a checkpoint."""
    data_s: float = Field(default=300.0, gt=0.0)
    """Seconds that the next step's data may let the loop wait; more than the retries of remote reads take."""
    evaluate_s: float = Field(default=1800.0, gt=0.0)
    """Seconds without a sign of progress in an evaluation."""
    save_s: float = Field(default=900.0, gt=0.0)
    """Seconds that the loop may stand still for a save."""
    finish_s: float = Field(default=3600.0, gt=0.0)
    """Seconds for what follows the last step (predictions, export, closing)."""
    poll_s: float = Field(default=0.25, gt=0.0, le=1.0)
    """Seconds between two looks at the rank and at the alarms."""
    publish_s: float = Field(default=5.0, gt=0.0)
    """Seconds between two small files that say where the rank is; one that is three times as old counts as silent."""
    report_s: float = Field(default=5.0, gt=0.0)
    """Seconds that collecting stacks and naming the suspect may take."""
    kill_s: float = Field(default=5.0, gt=0.0)
    """Seconds that the kernel has to end a killed rank before the watchdog leaves."""
    peer_grace_s: float = Field(default=2.0, gt=0.0)
    """Seconds that a rank has to leave by itself, with its own message, after a peer has died or left with a fault."""

    def budgets(self) -> PhaseBudgets:
        """The allowances alone."""
        return PhaseBudgets(**{field.name: getattr(self, field.name) for field in dataclasses.fields(PhaseBudgets)})


class Watchdog:
    """A context manager around all that a rank does; make and enter it on the main thread, before the rendezvous.

    Attributes:
        heartbeat: to be told of each phase; works alike when the watchdog is switched off.
    """

    def __init__(self, config: WatchdogConfig, world: World, run_folder: Path) -> None:
        """Make the heartbeat; nothing is started yet."""
        self._config, self._world, self._run_folder = config, world, run_folder
        self.heartbeat = Heartbeat(on_check=self._look_after_sidecar)
        self._sidecar: subprocess.Popen[bytes] | None = None
        self._started = 0
        self._settings: SidecarSettings | None = None
        self._stacks: int | None = None
        self._catches_crashes = False

    @property
    def sidecar_pid(self) -> int | None:
        """Process number of the watching process, or None when there is none."""
        return self._sidecar.pid if self._sidecar is not None else None

    def __enter__(self) -> Watchdog:
        """Start watching.

        Raises:
            StorageError: the run folder cannot be written.
        """
        if self._config.enabled:
            folder = HealthFolder(self._run_folder, job=job_name(self._world, os.environ))
            self._open_stacks(folder.stacks_path(self._world.rank))
            me = identify(os.getpid())
            assert me is not None
            timing = {name: getattr(self._config, name) for name in SidecarSettings.TIMING}
            self._settings = SidecarSettings(
                run_folder=str(self._run_folder.absolute()), rank=self._world.rank, world_size=self._world.size, pid=me.pid,
                started=me.started, descriptor=self.heartbeat.descriptor, job=folder.job, first=folder.first,
                meeting_point=_meeting_point(self._world), budgets=self._config.budgets(), **timing,
            )  # fmt: skip
            self._start_sidecar(self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = _ended(error)
        self.heartbeat.close(ended)
        self._close_stacks()
        # After a fault the sidecar stays for a moment, to see whether the peers have noticed.
        if self._sidecar is not None and ended is Ended.CLEANLY:
            try:
                self._sidecar.wait(_GOODBYE_S)
            except subprocess.TimeoutExpired:  # it hangs on the run folder: nothing to watch any more
                self._sidecar.kill()
                self._sidecar.wait()

    def _open_stacks(self, path: Path) -> None:
        """Open the file now: when the rank hangs, nothing can be opened any more."""
        try:
            self._stacks = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error}") from error
        self._stacks_path = path
        faulthandler.unregister(STACKS_SIGNAL)
        # Ignored first, so that a late signal finds it ignored again after `unregister`: its default ends the process.
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        if not faulthandler.is_enabled():
            faulthandler.enable(file=self._stacks, all_threads=True)
            self._catches_crashes = True

    def _close_stacks(self) -> None:
        if self._stacks is None:
            return
        faulthandler.unregister(STACKS_SIGNAL)
        if self._catches_crashes:
            faulthandler.disable()
        if os.fstat(self._stacks).st_size == 0:
            self._stacks_path.unlink(missing_ok=True)
        os.close(self._stacks)
        self._stacks = None

    def _start_sidecar(self, settings: SidecarSettings) -> None:
        path = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]))
        # A session of its own: a signal to the rank's whole group must not take the witness with it.
        self._sidecar = subprocess.Popen(
            [sys.executable, "-m", "dstrain.health.sidecar", json.dumps(settings.to_plain())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[settings.descriptor],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._started += 1

    def _look_after_sidecar(self) -> None:
        """Start another sidecar when it has gone; called from the loop, at most every ten seconds."""
        if self._sidecar is None or self._settings is None or self._sidecar.poll() is None:
            return
        if self._started >= SIDECARS_AT_MOST:
            _LOG.warning("the watchdog of rank %d was ended again: going on without one", self._world.rank)
            self._sidecar = None
            return
        _LOG.warning(
            "the watchdog of rank %d was ended (code %s): starting another", self._world.rank, self._sidecar.returncode
        )
        self._start_sidecar(self._settings)


def _ended(error: BaseException | None) -> Ended:
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return Ended.CLEANLY
    return Ended.BY_A_LOST_PEER if isinstance(error, PeerGoneError) else Ended.BY_A_FAULT


def _meeting_point(world: World) -> tuple[str, int] | None:
    return None if world.is_on_one_host else (world.master_addr, world.master_port)
