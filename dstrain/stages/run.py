"""One training run: find a checkpoint, build the engine, restore, loop, go back when asked to, finish. The same for every stage.

Checkpoints are looked for and verified by rank 0 and opened by all; every local fault is agreed before the next collective,
so that no rank waits for one that has left. Saving is `saving`, what ranks compare is `cross_checks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dstrain.base.config import dump_yaml, to_plain
from dstrain.base.device import device_name
from dstrain.base.errors import CheckpointError, ConfigError, ExitCode, NothingToResumeError, StorageError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import Interrupted, Observer, RunState, ShouldLeave, StepFlags
from dstrain.base.secrets import redacted
from dstrain.base.storage import make_directory, write_json, write_text
from dstrain.checkpoint.layout import published_steps, step_folder
from dstrain.checkpoint.manifest import model_fingerprint, stored_states
from dstrain.checkpoint.reader import Checkpoint
from dstrain.data.prefetch import Prefetcher
from dstrain.health.guards import Guards, Verdict
from dstrain.models.huggingface import anatomy, architecture_of, facts
from dstrain.monitor.flops import ModelShape
from dstrain.monitor.monitor import Monitor
from dstrain.stages.assembly import AnyConfig, Assembly, Site, build_engine
from dstrain.stages.cross_checks import CrossChecks, tell_mixed_devices
from dstrain.stages.environment import describe_environment, package_versions
from dstrain.stages.hyperparameters import hyperparameters
from dstrain.stages.learning_rate import learning_rate_of
from dstrain.stages.oversight import Oversight
from dstrain.stages.passage import passage_of
from dstrain.stages.roll_back import Window, go_back, read_windows, windows_missing
from dstrain.stages.sanity import check_start
from dstrain.stages.saving import Contents, Saving
from dstrain.train.compiling import GraphWatch
from dstrain.train.engine import Engine
from dstrain.train.histograms import Histograms
from dstrain.train.loop import Boundary, Ending, train

_LOG = get_logger(__name__)
_ROWS_TOLD = 256  # of a faulty step, in its event: enough to look at, small enough for a line


class Run:
    """One run's engine, state and checkpoints."""

    def __init__(self, config: AnyConfig, site: Site, parts: Assembly, guard: Oversight) -> None:
        self.config, self.site, self.parts, self.guard = config, site, parts, guard
        self.state = RunState()
        self.saving = Saving(
            config.checkpoint,
            run_folder=config.run_folder,
            control=site.control,
            lease=guard.lease,
            stop=guard.stop,
            should_leave=guard.should_leave,
        )
        self.config_yaml = dump_yaml(redacted({"stage": parts.stage, **to_plain(config)}))
        self.guards = Guards(config.train.guards, loss_scaling=site.precision == "fp16", phase_of=parts.loader.phase_of)
        self.resumed_from: Checkpoint | None = None
        self._new_data: str | None = None

    def execute(self) -> ExitCode:
        """Collective. Resume, train, finish."""
        self.guard.enter("restore", 0)
        self._find_checkpoint()
        if self.resumed_from is not None and self._has_reached_the_end(self.resumed_from):
            marker = self.parts.finished_file
            finished = self.site.control.all_true(marker is None or (self.config.run_folder / marker).is_file())
            if self.parts.finish is None or finished:
                return self._already_complete(self.resumed_from)
        if self._is_asked_to_leave():
            return self._left_at_once()
        self.site.control.together(self._describe)
        self.guard.enter("start_up", 0)
        check_start(self.config, self.site, num_parameters=facts(self.parts.model).num_parameters)
        self._build_engine()
        self.guard.enter("restore", 0)
        started = time.perf_counter()
        self._restore()
        self._open_monitor(time.perf_counter() - started)
        if self._is_asked_to_leave():
            return self._left_at_once()
        if self.state.step == 0:
            with contextlib.suppress(Interrupted):
                self._evaluate(0)
        while (ending := self._loop()) is Ending.ROLL_BACK:
            self._roll_back()
        return self._end(ending)

    def close(self) -> None:
        """Local. Leave nothing behind of a save that was in flight when the run ended in a fault."""
        self.saving.writer.close()

    def _end(self, ending: Ending) -> ExitCode:
        """Collective. What the loop's end means."""
        self._require_saved(ending)
        if ending is Ending.STOPPED:
            return self._stopped()
        if self.parts.finish is not None:
            self.guard.enter("finish", self.state.step)
            try:
                self._finish(self.parts.finish)
            except Interrupted:
                return self._stopped()
        return ExitCode.COMPLETE

    def _stopped(self) -> ExitCode:
        """Collective. Saved on request."""
        self._say(f"stopped ({self.guard.why()}) and saved at step {self.state.step}; the same command goes on")
        return self.guard.code_of_a_stop(self.site.control)

    def _is_asked_to_leave(self) -> bool:
        """Collective. Whether any rank was asked to stop before the first step."""
        return not self.site.control.all_true(self.guard.stop.reason is None)

    def _left_at_once(self) -> ExitCode:
        """Collective. Asked to stop before a step was taken: what is on disk is all there is to save."""
        self._say(f"stopped ({self.guard.why()}) before the first step; nothing new to save")
        return self.guard.code_of_a_stop(self.site.control)

    def _require_saved(self, ending: Ending) -> None:
        """Collective. A run may only be called saved when the checkpoint of its last step is there."""
        if not self.saving.is_saved(self.state.step):
            what = "stopped at" if ending is Ending.STOPPED else "reached"
            raise StorageError(
                f"{what} step {self.state.step}, which could not be saved (see the errors above): make room or mend the "
                "disk, then start again; the run goes on from the checkpoint before"
            )

    def _find_checkpoint(self) -> None:
        """Rank 0 scans and verifies; the others open what it found."""
        control, folder, resume = self.site.control, self.saving.writer.folder, self.config.train.resume

        def scan() -> int:
            if not self.site.world.is_first:
                return -1
            make_directory(folder)
            self.saving.writer.remove_leftovers()
            found = self.saving.newest_valid()
            for path, reason in found.damaged:
                _LOG.warning("skipping a damaged checkpoint, kept for inspection: %s (%s)", path.name, reason)
            if found.checkpoint is None and resume == "require":
                raise NothingToResumeError(
                    f"{folder}: train.resume is require and there is no valid checkpoint; use auto to start anew"
                )
            if found.checkpoint is None and found.damaged:
                raise CheckpointError(
                    f"{folder}: every checkpoint is damaged ({found.damaged[0][1]}): "
                    "restore one from a copy, or move the folder away to start anew"
                )
            if found.checkpoint is not None and resume == "never":
                raise ConfigError(
                    f"run_folder: {self.config.run_folder} already has checkpoints and train.resume is never; choose another folder"
                )
            if found.checkpoint is None:
                return -1
            self.saving.writer.retention.note_verified(found.checkpoint.manifest.step)
            return found.checkpoint.manifest.step

        step = int(control.from_first(control.together(scan)))
        if step >= 0:
            self.resumed_from = control.together(lambda: _open_found(step_folder(folder, step)))
            control.together(self._check_resumable)

    def _check_resumable(self) -> None:
        manifest = self._checkpoint().manifest
        if manifest.stage != self.parts.stage:
            raise CheckpointError(
                f"{self.config.run_folder}: holds a {manifest.stage} run, this is {self.parts.stage}: set another run_folder"
            )
        shapes = {name: list(p.shape) for name, p in self.parts.model.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
        self._checkpoint().check_model(shapes, fingerprint=model_fingerprint(shapes))
        self._new_data = self.parts.loader.restore(
            manifest.loader, step=manifest.step, accept_new_data=self.config.train.accept_new_data
        )
        self._step_over(windows_missing(read_windows(self.config.run_folder), step=manifest.step))

    def _checkpoint(self) -> Checkpoint:
        if self.resumed_from is None:
            raise CheckpointError("no checkpoint was found")
        return self.resumed_from

    def _has_reached_the_end(self, checkpoint: Checkpoint) -> bool:
        """Whether all steps are done, and the last evaluation too."""
        return checkpoint.manifest.step >= self.parts.max_steps and not _state_of(checkpoint).evaluation_due

    def _already_complete(self, checkpoint: Checkpoint) -> ExitCode:
        self._say(
            f"{self.config.run_folder}: already complete at step {checkpoint.manifest.step}; raise the length to go on"
        )
        return ExitCode.COMPLETE

    def _describe(self) -> None:
        """Rank 0: what runs, how, and where; config.yaml and environment.json."""
        if not self.site.world.is_first:
            return
        world, parts, train_ = self.site.world, self.parts, self.config.train
        about = facts(parts.model)
        self._say(
            f"{parts.stage}: {about.num_parameters / 1e6:.1f} M parameters, attention {about.attention} ({about.attention_reason})"
        )
        self._say(
            f"global batch {train_.global_batch} = up to {train_.micro_batch} rows × {parts.accumulation} micro-batches "
            f"× {world.size} ranks; {parts.max_steps} steps"
        )
        self._say(
            f"ZeRO-{self.config.engine.zero_stage}, {self.site.precision}, "
            f"{self.site.device} × {torch.get_num_threads()} threads"
        )
        for note in parts.notes:
            self._say(note)
        folder = self.config.run_folder
        write_text(folder / "config.yaml", self.config_yaml)
        write_json(
            folder / "environment.json",
            redacted(describe_environment(world, device=self.site.device, precision=self.site.precision)),
        )

    def _build_engine(self) -> None:
        """Collective. The engine, with the fp32 weights of the assembly as exact masters."""
        config, parts = self.config, self.parts
        inner: nn.Module = parts.model.model  # type: ignore[assignment]
        self.aliases = tied_names(inner)
        initial = {name: p.detach().clone() for name, p in inner.named_parameters()}
        self.engine = build_engine(config, self.site, parts)
        self.fragments = self.engine.fragments
        if self.resumed_from is None and self.site.precision != "fp32":
            self.fragments.fill_masters(initial)
        compiling = self.engine.compiling
        self._say(f"blocks {'compiled' if compiling.enabled else 'not compiled'}: {compiling.reason}")
        self.site.control.together(self._tell_deepspeed)

    def _tell_deepspeed(self) -> None:
        """Rank 0: deepspeed.json."""
        if self.site.world.is_first:
            write_json(self.config.run_folder / "deepspeed.json", redacted(self.engine.ds_config))

    def _restore(self) -> None:
        """Collective. Fill the engine and the counters from the checkpoint, if there is one."""
        if self.resumed_from is not None:
            self._load(self.resumed_from)
            self.state = _state_of(self.resumed_from)
            self.guards.load_state_dict(self.resumed_from.manifest.health.get("guards", {}))
            self.saving.last_saved_step = self.state.step
            self._say(
                f"resumed from step {self.state.step}, written by {self.resumed_from.manifest.world_size} ranks at "
                f"ZeRO-{self.resumed_from.manifest.zero_stage}; {self.state.rows} rows and {self.state.tokens} tokens done"
            )

    def _load(self, checkpoint: Checkpoint) -> None:
        def fill() -> None:
            checkpoint.check_optimizer(self.fragments.moments, kind=self.config.optimizer.kind)
            checkpoint.load_into(self.fragments.held())

        with torch.no_grad():
            self.site.control.together(fill)
        self.fragments.refresh()
        self.fragments.set_optimizer_step(int(checkpoint.manifest.optimizer["step"]))
        self.fragments.set_loss_scale(checkpoint.manifest.optimizer.get("loss_scale"))

    def _open_monitor(self, restore_s: float) -> None:
        about = facts(self.parts.model)
        shape = ModelShape(
            layers=about.num_layers, hidden=about.hidden_size, intermediate=about.intermediate_size,
            vocab=about.vocab_size if self.parts.stage == "pretrain" else 1, gated=about.gated,
        )  # fmt: skip
        self.monitor = Monitor(
            self.config.monitor,
            run_folder=self.config.run_folder,
            world=self.site.world,
            max_steps=self.parts.max_steps,
            start_step=self.state.step,
            shape=shape if about.num_layers and about.hidden_size else None,
            device_name=device_name(self.site.device) if self.site.device == "cuda" else "cpu",
            num_devices=self.site.world.size,
            passage=passage_of(self.parts, anatomy(self.parts.model)),
            config_text=self.config_yaml,
            settings=hyperparameters(self.config, self.site, self.parts, num_parameters=about.num_parameters),
            goodput=self.guard.goodput,
        )
        if self.resumed_from is not None:
            self.monitor.event(
                "restored", step=self.state.step, seconds=restore_s, written_by=self.resumed_from.manifest.world_size
            )
            if self._new_data:
                self.monitor.event("new_data", step=self.state.step, difference=self._new_data)
                self._say(f"from step {self.state.step} on with other data, as asked: {self._new_data}")
        self._connect()

    def _connect(self) -> None:
        """Join the engine, the checkpoints and what ranks compare, once all are there."""
        world = self.site.world
        contents = Contents(
            fragments=lambda: self.fragments.owned(rank=world.rank, world_size=world.size),
            manifest=self._manifest, config_yaml=self.config_yaml, tokenizer=self.parts.tokenizer_folder,
        )  # fmt: skip
        self.saving.open(contents, state=lambda: self.state, monitor=self.monitor, past=self.guard.past())
        places = self.site.control.gather_json([socket.gethostname(), device_name(self.site.device)])
        tell_mixed_devices([device for _, device in places], self.monitor, is_first=world.is_first)
        self.checks = CrossChecks(
            self.config, self.site.control, weights=self.engine.weights, monitor=self.monitor,
            hosts=[host for host, _ in places],
        )  # fmt: skip
        self.observers: list[Observer] = [self.checks, self.saving, self.guard]
        if self.engine.compiling.enabled:
            self.observers.append(GraphWatch(self.monitor.event))
        if (every := self.config.monitor.histograms_every) is not None and self.config.monitor.tensorboard:
            histograms = Histograms(
                every, names=self.fragments.shapes, owned=contents.fragments, control=self.site.control,
                write=self.monitor.histograms, start_step=self.state.step,
            )  # fmt: skip
            self.engine.show_updates(histograms.look)
            self.observers.append(histograms)
        self.observers.append(self.monitor)
        if self.checks.replicas.not_applicable and world.size > 1:
            self._say(f"weights are not compared between ranks: {self.checks.replicas.not_applicable}")

    def _loop(self) -> Ending:
        config, parts = self.config, self.parts
        boundary = Boundary(
            evaluate=self._evaluate if parts.evaluate is not None else None,
            save=self.saving.start,
            settle=self.saving.settle,
            evaluate_every=config.train.evaluate_every,
            save_every=self.saving.every_steps,
            last_saved=self.state.step if self.resumed_from is not None else -1,
            progress=self.guard,
        )
        with Prefetcher(
            parts.loader, first_step=self.state.step, last_step=parts.max_steps, depth=parts.prefetch_steps,
            threads=parts.prefetch_threads, limit_bytes=parts.prefetch_bytes, should_leave=self.guard.should_leave,
        ) as steps:  # fmt: skip
            return train(
                engine=self.engine,
                steps=steps,
                state=self.state,
                max_steps=parts.max_steps,
                learning_rate=learning_rate_of(
                    config.schedule,
                    peak=config.optimizer.learning_rate,
                    stop=config.stop,
                    max_steps=parts.max_steps,
                    state=self.state,
                    control=self.site.control,
                ),
                observers=self.observers,
                boundary=boundary,
                flags=self._flags,
                guards=self.guards,
                on_fault=self._note_fault,
                on_damage=self._close_blocks,
            )

    def _flags(self) -> StepFlags:
        """What this rank asks of the next step."""
        self.saving.tell()
        stop = self.guard.stop
        return StepFlags(
            stop=stop.reason is not None, hurry=stop.hurry, save_wanted=self.saving.is_wanted(self.state.step),
            save_failed=self.saving.failed(),
        )  # fmt: skip

    def _note_fault(self, verdict: Verdict) -> None:
        """Every rank alike: a step that was not sound, with the rows it was made of."""
        rows = self.parts.loader.rows_of(verdict.step)[:_ROWS_TOLD] if self.site.world.is_first else ()
        self.monitor.event("guard", step=verdict.step + 1, rows=[list(row) for row in rows], **verdict.to_json())
        self._say(f"step {verdict.step + 1}: {verdict.reason}: {verdict.action.replace('_', ' ')}")

    def _roll_back(self) -> None:
        """Collective. Load a state from before the trouble, step over the data around it, and judge on from there."""
        verdict, control, world = self.guards.verdict, self.site.control, self.site.world
        wanted = verdict.roll_back
        assert wanted is not None, "only a verdict with a way back ends the loop so"
        self.guard.enter("restore", self.state.step)
        folder = self.saving.writer.folder

        def choose() -> list[dict[str, Any]]:
            if not world.is_first:
                return []
            chosen = go_back(self.config.run_folder, self.saving.writer, wanted, reason=verdict.reason)
            missing = windows_missing(read_windows(self.config.run_folder), step=chosen.step)
            return [dataclasses.asdict(w) for w in (chosen, *missing)]

        # Told by rank 0, not read by each: another host's cache may still show the record as it was.
        window, *missing = (Window(**w) for w in control.from_first(control.together(choose)))
        checkpoint = control.together(lambda: Checkpoint(step_folder(folder, window.step)))
        spent = self.state.compute_seconds
        self._load(checkpoint)
        # In place: the loop's observers and the saves hold on to the counters.
        for name, value in dataclasses.asdict(_state_of(checkpoint)).items():
            setattr(self.state, name, value)
        self.state.compute_seconds = spent
        control.together(lambda: self.parts.loader.restore(checkpoint.manifest.loader, step=window.step))
        self._step_over(missing)
        self.guards.rolled_back(checkpoint.manifest.health.get("guards", {}))
        self.resumed_from = checkpoint
        self.saving.last_saved_step = window.step
        self.monitor.went_back(step=window.step, stepped_over=[window.first, window.last], reason=window.reason)
        self._say(
            f"went back to step {window.step} ({window.reason}); the data of steps {window.first} to {window.last - 1} is stepped over"
        )

    def _step_over(self, windows: Sequence[Window]) -> None:
        for window in windows:
            self.parts.loader.skip_window(window.first, window.last, from_step=window.step)

    def _close_blocks(self, step: int, blocks: tuple[tuple[str, int], ...]) -> None:
        """Every rank alike: do without damaged blocks from the first step that no rank can have prepared yet."""
        for source, block, since in self.parts.loader.close_blocks(blocks, from_step=step + self.parts.prefetch_steps):
            self.monitor.event("damaged_block", step=step, source=source, block=block, from_step=since)
            self._say(f"block {block} of source {source!r} is damaged: the run goes on without it from step {since}")

    def _leave_evaluation(self) -> bool:
        self.guard.enter("evaluate", self.state.step)  # a sign of progress, for the watchdog
        return self.guard.should_leave()

    def _evaluate(self, step: int) -> bool:
        """Collective. Score the held-out data; True when it is the best so far."""
        if self.parts.evaluate is None:
            return False
        started = time.perf_counter()
        metrics = self.parts.evaluate(self.engine, self._leave_evaluation)
        seconds = time.perf_counter() - started
        deciding = self.parts.deciding_metric
        best = self.state.best_metric
        is_best = deciding is not None and step > 0 and (best is None or metrics[deciding] > best)
        self.monitor.evaluated(step, {**metrics, "seconds": seconds}, is_kept=is_best or deciding is None)
        if is_best and deciding is not None:
            self.state.best_metric, self.state.best_step = metrics[deciding], step
        return is_best

    def _manifest(self, step: int) -> dict[str, Any]:
        shapes = self.fragments.shapes
        return {
            "step": step,
            "world_size": self.site.world.size,
            "zero_stage": self.config.engine.zero_stage,
            "precision": self.site.precision,
            "stage": self.parts.stage,
            "parameters": shapes,
            "model_fingerprint": model_fingerprint(shapes),
            "aliases": self.aliases,
            "architecture": architecture_of(self.parts.model),
            "state": dataclasses.asdict(self.state),
            "loader": self.parts.loader.state_dict(),
            "optimizer": {"step": self.fragments.optimizer_step(), "loss_scale": self.fragments.loss_scale()},
            "extra": dict(self.parts.extra),
            "health": {"guards": self.guards.state_dict()},
            "environment": package_versions(),
            **stored_states(self.fragments.moments),
        }

    def _finish(self, finish: Callable[[Engine, ShouldLeave], None]) -> None:
        """Collective. Load the best checkpoint and let the stage use it."""
        best = self.state.best_step
        if best is not None and best != self.state.step:
            path = next((p for s, p in published_steps(self.saving.writer.folder) if s == best), None)
            if path is not None:
                self._load(self.site.control.together(lambda: Checkpoint(path)))
        finish(self.engine, self._leave_evaluation)

    def _say(self, text: str) -> None:
        if self.site.world.is_first:
            _LOG.info("%s", text)


def _open_found(folder: Path) -> Checkpoint:
    """A checkpoint that rank 0 has found.

    Raises:
        CheckpointError: this host does not see it, or it cannot be read here.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: rank 0 sees this checkpoint and {socket.gethostname()} does not: set run_folder to a folder on a file "
            "system that all hosts share"
        )
    return Checkpoint(folder)


def _state_of(checkpoint: Checkpoint) -> RunState:
    known = {f.name for f in dataclasses.fields(RunState)}
    return RunState(**{k: v for k, v in checkpoint.manifest.state.items() if k in known})


def tied_names(model: nn.Module) -> dict[str, str]:
    """Alias → stored name, for parameters that share one tensor."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
