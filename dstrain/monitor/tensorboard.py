"""The door to TensorBoard: curves, texts and the page layout of one run. A view of events.jsonl, never read back.

After a resume the writer is opened with `purge_step`, so TensorBoard drops points that the resume took back and curves
go on without overlap. Best effort: writing happens on a thread, and a deleted, full or unwritable folder loses points,
counts them, warns once and tries a new file later. It never stops a training step.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from dstrain.base.logs import get_logger
from dstrain.base.secrets import redact
from dstrain.base.world import World
from dstrain.monitor.goodput import BUCKETS
from dstrain.monitor.histogram import Histogram
from dstrain.monitor.hparams import Setting, completed, table_of

_log = get_logger(__name__)

_BALANCE = "slowest rank over the median: its own work, waiting for data"

# Charts of TensorBoard's "custom scalars" page: group -> chart -> curves, as regular expressions.
LAYOUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Loss and accuracy": {
        "loss": ["train/loss", "evaluation/loss.*"],
        "accuracy and scores": ["train/accuracy", "evaluation/.*accuracy", "evaluation/(f1|mcc|spearman|pearson)"],
        "learning rate": ["train/learning_rate"],
    },
    "Throughput and cost": {
        "real tokens per second": ["throughput/tokens_per_second"],
        "model FLOP utilisation": ["throughput/mfu"],
        "where a step's seconds go": ["time/.*"],
        "cost, US dollars": ["cost/usd"],
        "goodput: productive share of the wall time": ["goodput/ratio"],
        "where the wall time went, seconds": [f"goodput/{bucket}" for bucket in BUCKETS],
    },
    "Health": {
        "gradient norm": ["train/gradient_norm"],
        "steps left out, numbers lost": ["health/skipped_steps", "health/numbers_lost"],
        "slowest rank's own work over the median rank's": ["ranks/work_over_median"],
        "number of the slowest rank": ["ranks/slowest"],
        "longest wait for data beyond the median rank's, share of a step": ["ranks/data_excess"],
        "communication, share of a step: least and most of any rank": ["ranks/communication_(least|most)"],
    },
    "Data": {
        "waiting for data, share of a step": ["data/wait_share"],
        "padding, percent": ["throughput/padding_percent"],
        "tokens": ["progress/tokens"],
        "epoch": ["progress/epoch"],
        "ledger, low 24 bits: equal curves, equal data": ["ledger/total"],
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
        absent: beginnings of names of curves that this run has not; charts of nothing else are left out.
        settings: columns and this run's row of the hyper-parameter page; none leaves the page out.
        retry_seconds: how long points are dropped after a failure before a new file is tried.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        start_step: int,
        texts: Mapping[str, str] | None = None,
        absent: Collection[str] = (),
        settings: Sequence[Setting] = (),
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
        self._absent = tuple(absent)
        self._settings = tuple(settings)
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

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Write one histogram under each name at `step`; an empty one is left out."""

        def work(writer: SummaryWriter) -> None:
            for name, histogram in found.items():
                edges, counts = histogram.occupied()
                if counts:
                    writer.add_histogram_raw(
                        name, min=edges[0], max=edges[-1], num=histogram.size, sum=histogram.total,
                        sum_squares=histogram.squares, bucket_limits=edges, bucket_counts=counts, global_step=step,
                    )  # fmt: skip

        self._attempt(work)

    def completed(self) -> None:
        """Mark this run as complete on the page of hyper-parameters."""
        if self._settings:
            self._attempt(lambda writer: _add(writer, completed(ended_at=time.time())))

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
            self._writer.add_custom_scalars(_layout(self._absent))
            for title, text in self._texts.items():
                self._writer.add_text(title, redact(text), 0)
            if self._settings:
                _add(self._writer, *table_of(self._settings, started_at=time.time()))
        return self._writer

    def _lose(self, error: Exception, *, pause: bool = True) -> None:
        self.dropped += 1
        if pause:
            self._retry_at = time.monotonic() + self._retry_seconds
        if not self._warned:
            self._warned = True
            _log.warning("%s: TensorBoard points are being lost (training goes on): %s", self.folder, error)


def _layout(absent: tuple[str, ...]) -> dict[str, dict[str, list[Any]]]:
    """As SummaryWriter takes it, without charts that would stay empty."""
    return {
        group: {
            title: ["Multiline", list(curves)]
            for title, curves in charts.items()
            if not all(curve.startswith(absent) for curve in curves)
        }
        for group, charts in LAYOUT.items()
    }


def _add(writer: SummaryWriter, *records: Summary) -> None:
    for record in records:
        writer.file_writer.add_summary(record)  # type: ignore[attr-defined]
