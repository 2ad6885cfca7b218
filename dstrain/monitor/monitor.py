"""The observer that turns step reports into numbers for people and tools: events, TensorBoard, the terminal line.

Looks at the loop and touches nothing: with it or without it, a run computes the same bits. Loss, accuracy, learning
rate and gradient norm are those of the written step itself, so curves of two runs compare point by point; speed,
padding and times are taken over all steps since the last written one. Best effort throughout: whatever fails while numbers
are written loses those numbers, is counted and said once, and never reaches the loop.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from dstrain.base.logs import get_logger
from dstrain.base.protocols import RunState, StepReport
from dstrain.base.world import World
from dstrain.monitor.config import MonitorConfig
from dstrain.monitor.events import EventLog
from dstrain.monitor.flops import (
    ModelShape,
    Passage,
    PassageSum,
    flops_per_token,
    known_peak_tflops,
    model_flops_utilisation,
)
from dstrain.monitor.goodput import Goodput
from dstrain.monitor.goodput_meter import GoodputMeter
from dstrain.monitor.histogram import Histogram
from dstrain.monitor.hparams import HELD_OUT, Setting
from dstrain.monitor.tensorboard import TensorBoard
from dstrain.monitor.terminal import TerminalLine

_log = get_logger(__name__)

TIME_PARTS = ("data", "forward_backward", "step", "save", "evaluate", "other")
"""Where a step's wall seconds go; their sum is `total`."""

# TensorBoard keeps curves as float32, which holds whole numbers up to 2^24 exactly: these low bits of a ledger survive it.
_LEDGER_CURVE_BITS = 24
_GOODPUT_EVENT_SECONDS = 60.0

ParametersT = ParamSpec("ParametersT")


@dataclass
class _Window:
    """Sums over the steps since the last written point."""

    steps: int = 0
    tokens: int = 0
    targets: int = 0
    padded_tokens: int = 0
    passage: PassageSum = field(default_factory=PassageSum)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, report: StepReport, passage: Passage) -> None:
        self.steps += 1
        self.tokens += report.num_tokens
        self.targets += report.num_targets
        self.padded_tokens += report.padded_tokens
        self.passage.add(report.num_tokens, passage)
        for part, seconds in report.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def tokens_per_second(self) -> float:
        total = self.seconds.get("total", 0.0)
        return self.tokens / total if total > 0 else 0.0

    @property
    def padding_percent(self) -> float:
        return 100 * (1 - self.tokens / self.padded_tokens) if self.padded_tokens else 0.0

    @property
    def scored_share(self) -> float:
        return self.targets / self.tokens if self.tokens else 0.0


def _best_effort(
    method: Callable[Concatenate[Monitor, ParametersT], None],
) -> Callable[Concatenate[Monitor, ParametersT], None]:
    """Let no failure of a monitor's method out."""

    @functools.wraps(method)
    def careful(self: Monitor, /, *args: ParametersT.args, **kwargs: ParametersT.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  (numbers are a view of the run, which goes on without them)
            self.note_failure(error)

    return careful


class Monitor:
    """Implements `base.protocols.Observer`; does nothing on ranks above 0.

    Writes `started` (or `resumed` when `start_step` > 0) when it is made, `step` at step 1, every `log_every` steps and
    at the last step, `step_skipped` for every skipped step, `evaluated`, and `ended`.

    Args:
        config: what to write and how often.
        run_folder: gets events.jsonl and tensorboard/.
        world: this process's place.
        max_steps: optimizer steps of the whole run.
        start_step: optimizer steps already done, 0 for a fresh run.
        shape: the model's sizes for the utilisation curve, or None for none.
        device_name: as torch.cuda.get_device_name says, or "cpu".
        num_devices: devices of the whole job.
        passage: of a token through the layers at a step, for the utilisation curve.
        config_text: the resolved configuration, for TensorBoard's text page.
        settings: of the run, for TensorBoard's page of hyper-parameters.
        goodput: measures where wall time goes; one that was started earlier knows more of the start. None makes one.
    """

    def __init__(
        self,
        config: MonitorConfig,
        *,
        run_folder: Path,
        world: World,
        max_steps: int,
        start_step: int,
        shape: ModelShape | None,
        device_name: str,
        num_devices: int,
        passage: Callable[[int], Passage] = lambda _: Passage(),
        config_text: str = "",
        settings: Sequence[Setting] = (),
        goodput: GoodputMeter | None = None,
    ) -> None:
        self._config = config
        self._active = world.is_first
        self._max_steps = max_steps
        self._shape = shape
        self._passage = passage
        self._num_devices = num_devices
        self._peak_tflops = config.peak_tflops or known_peak_tflops(device_name)
        self._window, self._whole = _Window(), _Window()
        self.failures = 0
        """Calls whose numbers were lost for another reason than what events and TensorBoard count themselves."""
        self.goodput = goodput or GoodputMeter(run_folder, active=world.is_first)
        self.goodput.start(start_step)
        self._goodput_written = time.monotonic()
        self.events = EventLog(run_folder / "events.jsonl", world)
        self._tensorboard: TensorBoard | None = None
        if config.tensorboard:
            texts = {"configuration": f"```yaml\n{config_text}\n```"} if config_text else {}
            self._tensorboard = TensorBoard(
                run_folder / "tensorboard", world, start_step=start_step, texts=texts, absent=self._absent(world),
                settings=settings,
            )  # fmt: skip
        self._terminal = TerminalLine(world, max_steps=max_steps)
        name = "resumed" if start_step else "started"
        self.event(
            name, step=start_step, max_steps=max_steps, world=world.size, device=device_name, num_devices=num_devices
        )

    def event(self, name: str, **fields: Any) -> None:
        """Write an event of another room, e.g. `event("save_failed", step=100, error="disk full")`."""
        self.events.write(name, **fields)

    def note_failure(self, error: Exception) -> None:
        """Count numbers that were lost; the first failure is said."""
        self.failures += 1
        if self.failures == 1:
            _log.warning("numbers of this run are being lost (training goes on): %s: %s", type(error).__name__, error)

    @_best_effort
    def on_step(self, state: RunState, report: StepReport) -> None:
        """Take note of a step; write a point when one is due."""
        if not self._active:
            return
        self.goodput.step(report)
        passage = self._passage(report.step - 1)
        self._window.add(report, passage)
        self._whole.add(report, passage)
        if not report.applied:
            self.event("step_skipped", step=report.step, loss=report.loss, gradient_norm=report.gradient_norm)
        due = report.step % self._config.log_every == 0 or report.step in (1, self._max_steps)
        self._terminal.show(
            report,
            tokens_per_second=self._window.tokens_per_second,
            padding_percent=self._window.padding_percent,
            is_logged=due,
        )
        if due:
            self._write_point(state, report)
            self._window = _Window()

    @_best_effort
    def saved(self, state: RunState, *, seconds: float, folder: str) -> None:
        """Write that a checkpoint of the present state was published, and the run's whole ledger with it."""
        self.event("saved", step=state.step, seconds=seconds, folder=folder, ledger=str(state.ledger))
        if self._active and self._tensorboard is not None:
            text = f"step {state.step:,}: {state.rows:,} rows, {state.tokens:,} tokens, ledger `{state.ledger}`"
            self._tensorboard.text(state.step, "ledger", text)

    @_best_effort
    def went_back(self, *, step: int, stepped_over: list[int], reason: str) -> None:
        """Write that the run goes on from an older state; curves continue from there without overlap."""
        self.event("rolled_back", step=step, stepped_over=stepped_over, reason=reason)
        if self._active and self._tensorboard is not None:
            self._tensorboard.go_back(step)

    @_best_effort
    def evaluated(self, step: int, metrics: Mapping[str, float], *, is_kept: bool = True) -> None:
        """Write the result of an evaluation after `step` steps, e.g. `{"loss": 3.1, "accuracy": 0.4}`.

        Args:
            step: optimizer steps done.
            metrics: by name.
            is_kept: whether these weights are, so far, what the run is judged by: the newest, or the best.
        """
        if not self._active:
            return
        self.goodput.part("evaluate", metrics.get("seconds", 0.0))
        self.event("evaluated", step=step, metrics=dict(metrics))
        if self._tensorboard is not None:
            curves = {f"evaluation/{name}": value for name, value in metrics.items()}
            if is_kept:
                curves |= {f"hparam/held_out_{name}": metrics[name] for name in HELD_OUT if name in metrics}
            self._tensorboard.scalars(step, curves)
        _log.info("evaluation at step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    @_best_effort
    def ranks(self, step: int, figures: Mapping[str, float]) -> None:
        """Write how evenly the ranks worked since the last time: a few figures, however many ranks there are."""
        if not self._active:
            return
        self.event("ranks", step=step, **figures)
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, {f"ranks/{name}": value for name, value in figures.items()})

    @_best_effort
    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Write histograms of weights and gradients, by name, to TensorBoard only."""
        if self._active and self._tensorboard is not None:
            self._tensorboard.histograms(step, found)

    @_best_effort
    def on_end(self, state: RunState) -> None:
        """Write the last event and close everything; `event` still works afterwards."""
        if not self._active:
            return
        # Since the last step, the loop did nothing else but evaluate (counted by itself), save, and wait for the save.
        self.goodput.rest("save_stall")
        is_complete = state.step >= self._max_steps
        self.goodput.end("complete" if is_complete else "saved")
        goodput = self.goodput.total()
        self.event(
            "ended",
            step=state.step,
            rows=state.rows,
            tokens=state.tokens,
            ledger=str(state.ledger),
            skipped_steps=state.skipped_steps,
            compute_seconds=state.compute_seconds,
            events_dropped=self._numbers_lost(),
            goodput=goodput.to_plain(),
            **self._cost(state),
        )
        self._terminal.close()
        _log.info("%s", goodput.table())
        if self._tensorboard is not None:
            self._tensorboard.scalars(state.step, self._figures(state, goodput))
            if is_complete:
                self._tensorboard.completed()
            self._tensorboard.close()
        self.events.close()

    def _write_point(self, state: RunState, report: StepReport) -> None:
        window = self._window
        speed = {
            "tokens_per_second": window.tokens_per_second,
            "padding_percent": window.padding_percent,
            **self._utilisation(window, window.tokens_per_second),
        }
        seconds = {part: window.seconds.get(part, 0.0) / window.steps for part in (*TIME_PARTS, "total")}
        learning = {
            "loss": report.loss,
            "accuracy": report.accuracy,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
        }
        progress = {"tokens": state.tokens, "rows": state.rows, "epoch": report.epoch}
        cost = self._cost(state)
        self.event(
            "step",
            step=report.step,
            **learning,
            **speed,
            **progress,
            **cost,
            applied=report.applied,
            ledger=str(state.ledger),
            step_ledger=str(report.ledger),
            num_targets=report.num_targets,
            seconds=seconds,
            window_steps=window.steps,
        )
        goodput = self.goodput.total()
        if time.monotonic() - self._goodput_written >= _GOODPUT_EVENT_SECONDS:
            self._goodput_written = time.monotonic()
            self.event("goodput", step=report.step, **goodput.to_plain())
        if self._tensorboard is not None:
            curves: dict[str, float] = {f"train/{name}": value for name, value in learning.items()}
            curves.update({f"throughput/{name}": value for name, value in speed.items()})
            curves.update({f"progress/{name}": value for name, value in progress.items()})
            curves.update(ledger_curves(total=state.ledger, of_step=report.ledger))
            curves.update({f"time/{part}_seconds": seconds[part] for part in TIME_PARTS})
            curves.update({f"cost/{name.removeprefix('cost_')}": value for name, value in cost.items()})
            curves["data/wait_share"] = seconds["data"] / seconds["total"] if seconds["total"] > 0 else 0.0
            curves["health/skipped_steps"] = state.skipped_steps
            curves["health/numbers_lost"] = self._numbers_lost()
            curves["goodput/ratio"] = goodput.ratio
            curves.update({f"goodput/{bucket}": spent for bucket, spent in goodput.seconds.items()})
            self._tensorboard.scalars(report.step, curves)

    def _absent(self, world: World) -> list[str]:
        """Curves that this run cannot have."""
        has = {
            "cost/": self._config.gpu_hour_usd is not None,
            "throughput/mfu": self._shape is not None and self._peak_tflops is not None,
            "ranks/": world.size > 1,
        }
        return [curve for curve, is_there in has.items() if not is_there]

    def _figures(self, state: RunState, goodput: Goodput) -> dict[str, float]:
        """What runs are compared by, over all their restarts."""
        speed = state.tokens / state.compute_seconds if state.compute_seconds > 0 else 0.0
        figures = {"tokens_per_second": speed, "goodput": goodput.ratio, **self._cost(state)}
        if self._whole.tokens:
            figures |= self._utilisation(self._whole, speed)
        return {f"hparam/{name}": value for name, value in figures.items()}

    def _numbers_lost(self) -> int:
        of_curves = self._tensorboard.dropped if self._tensorboard is not None else 0
        return self.events.dropped + of_curves + self.failures + self.goodput.dropped

    def _utilisation(self, window: _Window, tokens_per_second: float) -> dict[str, float]:
        if self._shape is None or self._peak_tflops is None:
            return {}
        passage = window.passage.mean
        mfu = model_flops_utilisation(
            tokens_per_second=tokens_per_second,
            flops_per_token=flops_per_token(
                self._shape,
                mean_context=passage.mean_context,
                scored_share=window.scored_share,
                layer_share=passage.layer_share,
            ),
            peak_tflops=self._peak_tflops,
            num_devices=self._num_devices,
        )
        return {"mfu": mfu}

    def _cost(self, state: RunState) -> dict[str, float]:
        """US dollars spent in steps so far, over all restarts, where a price is given."""
        if self._config.gpu_hour_usd is None:
            return {}
        return {"cost_usd": state.compute_seconds / 3600 * self._num_devices * self._config.gpu_hour_usd}


def ledger_curves(*, total: int, of_step: int) -> dict[str, float]:
    """The low bits of a run's ledger and of a step's, as numbers that a float32 curve keeps exactly.

    Two runs whose `ledger/total` curves lie on each other have, but for one chance in 16 million a point, seen the same
    data; the whole 63-bit values are in events.jsonl and, at every save, among TensorBoard's texts.
    """
    low = (1 << _LEDGER_CURVE_BITS) - 1
    return {"ledger/total": float(total & low), "ledger/step": float(of_step & low)}
