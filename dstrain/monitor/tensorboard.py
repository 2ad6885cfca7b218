"""The door to TensorBoard: curves, texts and the page layout of one run. A view of events.jsonl, never read back.

After a resume the writer is opened with `purge_step`, so TensorBoard drops points that the resume took back and curves
go on without overlap. Best effort: writing happens on a thread, and a deleted, full or unwritable folder loses points,
counts them, warns once and tries a new file later. It never stops a training step.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dstrain.base.logs import get_logger
from dstrain.base.secrets import redact
from dstrain.base.world import World
from dstrain.monitor.goodput import BUCKETS

_log = get_logger(__name__)

# Charts of TensorBoard's "custom scalars" page: group -> chart -> curves.
_LAYOUT = {
    "Learning": {
        "loss": ["Multiline", ["train/loss", "evaluation/loss"]],
        "accuracy": ["Multiline", ["train/accuracy", "evaluation/accuracy"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
        "gradient norm": ["Multiline", ["train/gradient_norm"]],
    },
    "Speed": {
        "real tokens per second": ["Multiline", ["throughput/tokens_per_second"]],
        "padding, percent": ["Multiline", ["throughput/padding_percent"]],
        "model FLOP utilisation": ["Multiline", ["throughput/mfu"]],
        "where a step's seconds go": ["Multiline", ["time/.*"]],
    },
    "Progress": {
        "tokens": ["Multiline", ["progress/tokens"]],
        "epoch": ["Multiline", ["progress/epoch"]],
        "cost, US dollars": ["Multiline", ["cost/usd"]],
        "goodput: productive share of the wall time": ["Multiline", ["goodput/ratio"]],
        "where the wall time went, seconds": ["Multiline", [f"goodput/{bucket}" for bucket in BUCKETS]],
        "ledger, low 24 bits: equal curves, equal data": ["Multiline", ["ledger/total"]],
    },
}

_FLUSH_SECONDS = 10
# Room for thousands of logged steps: a slow disk must fill this before it can hold up the training thread.
_QUEUE_RECORDS = 100_000


class TensorBoard:
    """Writes one run's curves; silent on every rank but the first.

    Args:
        folder: where event files go, `tensorboard/` in the run folder.
        world: this process's place.
        start_step: optimizer steps already done; points after it are purged.
        texts: title -> Markdown for TensorBoard's text page, such as the configuration.
        retry_seconds: how long points are dropped after a failure before a new file is tried.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        start_step: int,
        texts: Mapping[str, str] | None = None,
        retry_seconds: float = 60.0,
    ) -> None:
        self.folder = folder
        self.dropped = 0
        """Calls whose points were lost."""
        self._active = world.is_first
        self._purge_step: int | None = start_step + 1
        self._retry_seconds = retry_seconds
        self._retry_at = 0.0
        self._writer: SummaryWriter | None = None
        self._suffix = ""
        self._texts = dict(texts or {})
        self._warned = False

    def go_back(self, start_step: int) -> None:
        """Start a new file from which on TensorBoard drops points after `start_step`."""
        self.close()
        self._purge_step = start_step + 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point of each named curve at `step`."""

        def work(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._attempt(work)

    def text(self, step: int, title: str, text: str) -> None:
        """Write Markdown under a title of TensorBoard's text page at `step`."""
        self._attempt(lambda writer: writer.add_text(title, redact(text), step))

    def close(self) -> None:
        """Write out what is queued and close the file; writing again opens a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:  # noqa: BLE001  (best effort: see _attempt)
                self._lose(error)

    def _attempt(self, work: Callable[[SummaryWriter], None]) -> None:
        if not self._active:
            return
        if time.monotonic() < self._retry_at:
            self.dropped += 1
            return
        try:
            work(self._open())
        except Exception as error:  # noqa: BLE001  (a view of the run may fail in any way but must not stop it)
            self._lose(error)
            self.close()

    def _open(self) -> SummaryWriter:
        if self._writer is not None and not any(self.folder.glob(f"*{self._suffix}")):
            self._lose(FileNotFoundError("its event file was deleted"), pause=False)
            self.close()
        if self._writer is None:
            self._suffix = f".{uuid.uuid4().hex[:8]}"
            self._writer = SummaryWriter(
                str(self.folder),
                purge_step=self._purge_step,
                max_queue=_QUEUE_RECORDS,
                flush_secs=_FLUSH_SECONDS,
                filename_suffix=self._suffix,
            )
            self._purge_step = None  # a file opened later in this process takes nothing back
            self._writer.add_custom_scalars(_LAYOUT)
            for title, text in self._texts.items():
                self._writer.add_text(title, redact(text), 0)
        return self._writer

    def _lose(self, error: Exception, *, pause: bool = True) -> None:
        self.dropped += 1
        if pause:
            self._retry_at = time.monotonic() + self._retry_seconds
        if not self._warned:
            self._warned = True
            _log.warning("%s: TensorBoard points are being lost (training goes on): %s", self.folder, error)
