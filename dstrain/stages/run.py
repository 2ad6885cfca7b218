"""One training run: find a checkpoint, build the engine, restore, loop, save, finish. The same for every stage.

Checkpoints are looked for and verified by rank 0 and opened by all; every local fault is agreed before the next collective,
so that no rank waits for one that has left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dstrain.base.config import dump_yaml, to_plain
from dstrain.base.device import device_name
from dstrain.base.errors import (
    CheckpointError,
    ConfigError,
    ExitCode,
    NoProgressError,
    NothingToResumeError,
    StorageError,
)
from dstrain.base.logs import get_logger
from dstrain.base.protocols import RunState, StepFlags
from dstrain.base.storage import make_directory, write_json, write_text
from dstrain.checkpoint.fragments import EngineState
from dstrain.checkpoint.layout import checkpoints_folder, published_steps, step_folder
from dstrain.checkpoint.manifest import STATES, model_fingerprint
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from dstrain.checkpoint.writer import CheckpointWriter
from dstrain.data.prefetch import Prefetcher
from dstrain.health.guards import Guards
from dstrain.health.lease import RunLease
from dstrain.health.signals import StopRequest
from dstrain.models.huggingface import architecture_of, facts
from dstrain.monitor.flops import ModelShape
from dstrain.monitor.monitor import Monitor
from dstrain.optim.schedule import learning_rate_factor
from dstrain.stages.assembly import AnyConfig, Assembly, Site
from dstrain.stages.environment import describe_environment, package_versions
from dstrain.train.engine import PARAMETER_PREFIX, Engine
from dstrain.train.loop import Boundary, Ending, train

_LOG = get_logger(__name__)


class Run:
    """One run's engine, state and checkpoints."""

    def __init__(self, config: AnyConfig, site: Site, parts: Assembly, lease: RunLease) -> None:
        self.config, self.site, self.parts, self.lease = config, site, parts, lease
        self.state = RunState()
        self.writer = CheckpointWriter(
            checkpoints_folder(config.run_folder), config=config.checkpoint, control=site.control
        )
        self.config_yaml = dump_yaml({"stage": parts.stage, **to_plain(config)})
        self.resumed_from: Checkpoint | None = None
        self._new_data: str | None = None

    def execute(self, stop: StopRequest) -> ExitCode:
        """Collective. Resume, train, finish."""
        self._find_checkpoint()
        if self.resumed_from is not None and self.resumed_from.manifest.step >= self.parts.max_steps:
            marker = self.parts.finished_file
            finished = self.site.control.all_true(marker is None or (self.config.run_folder / marker).is_file())
            if self.parts.finish is None or finished:
                return self._already_complete(self.resumed_from)
        self._describe()
        self._build_engine()
        started = time.perf_counter()
        self._restore()
        self._open_monitor(time.perf_counter() - started)
        if self.state.step == 0:
            self._evaluate(0)
        ending = self._loop(stop)
        if ending is Ending.ROLL_BACK:
            raise NoProgressError(f"step {self.state.step}: {self.guards.verdict.reason}")
        if ending is Ending.STOPPED:
            self._require_saved()
            self._say(
                f"stopped ({stop.reason or 'asked on another rank'}) and saved at step {self.state.step}; the same command goes on"
            )
            return ExitCode.SAVED_REQUEUE
        if self.parts.finish is not None:
            self._finish(self.parts.finish)
        return ExitCode.COMPLETE

    def _require_saved(self) -> None:
        """Collective. A stop may only be called saved when the checkpoint of its step is there."""
        if not self.site.control.from_first(step_folder(self.writer.folder, self.state.step).is_dir()):
            raise StorageError(
                f"stopped at step {self.state.step}, which could not be saved (see the errors above): make room or mend the "
                "disk, then start again; the run goes on from the checkpoint before"
            )

    def _find_checkpoint(self) -> None:
        """Rank 0 scans and verifies; the others open what it found."""
        control, folder, resume = self.site.control, self.writer.folder, self.config.train.resume

        def scan() -> int:
            if not self.site.world.is_first:
                return -1
            make_directory(folder)
            self.writer.remove_leftovers()
            found = newest_valid(folder)
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
            return -1 if found.checkpoint is None else found.checkpoint.manifest.step

        step = int(control.from_first(control.together(scan)))
        if step >= 0:
            path = next(p for s, p in published_steps(folder) if s == step)
            self.resumed_from = control.together(lambda: Checkpoint(path))
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

    def _checkpoint(self) -> Checkpoint:
        if self.resumed_from is None:
            raise CheckpointError("no checkpoint was found")
        return self.resumed_from

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
            describe_environment(world, device=self.site.device, precision=self.site.precision),
        )

    def _build_engine(self) -> None:
        """Collective. The engine, with the fp32 weights of the assembly as exact masters."""
        config, parts = self.config, self.parts
        inner: nn.Module = parts.model.model  # type: ignore[assignment]
        self.aliases = tied_names(inner)
        initial = {name: p.detach().clone() for name, p in inner.named_parameters()}
        self.engine = Engine(
            parts.model, parts.objective, config=config.engine, optimizer=config.optimizer, control=self.site.control,
            device=self.site.device, precision=self.site.precision, micro_batch=config.train.micro_batch,
            accumulation=parts.accumulation, seed=config.seed, raw=config.deepspeed.values(),
        )  # fmt: skip
        self.fragments = EngineState(self.engine.engine, prefix=PARAMETER_PREFIX)
        if self.resumed_from is None and self.site.precision != "fp32":
            self.fragments.fill_masters(initial)
        if self.site.world.is_first:
            write_json(config.run_folder / "deepspeed.json", self.engine.ds_config)

    def _restore(self) -> None:
        """Collective. Fill the engine and the counters from the checkpoint, if there is one."""
        if self.resumed_from is not None:
            self._load(self.resumed_from)
            known = {f.name for f in dataclasses.fields(RunState)}
            self.state = RunState(**{k: v for k, v in self.resumed_from.manifest.state.items() if k in known})
            self._say(
                f"resumed from step {self.state.step}, written by {self.resumed_from.manifest.world_size} ranks at "
                f"ZeRO-{self.resumed_from.manifest.zero_stage}; {self.state.rows} rows and {self.state.tokens} tokens done"
            )

    def _load(self, checkpoint: Checkpoint) -> None:
        with torch.no_grad():
            self.site.control.together(lambda: checkpoint.load_into(self.fragments.held()))
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
            mean_context=self.parts.mean_context,
            config_text=self.config_yaml,
        )
        if self.resumed_from is not None:
            self.monitor.event(
                "restored", step=self.state.step, seconds=restore_s, written_by=self.resumed_from.manifest.world_size
            )
            if self._new_data:
                self.monitor.event("new_data", step=self.state.step, difference=self._new_data)
                self._say(f"from step {self.state.step} on with other data, as asked: {self._new_data}")

    def _loop(self, stop: StopRequest) -> Ending:
        config, parts = self.config, self.parts
        peak = config.optimizer.learning_rate
        self.guards = Guards(config.train.guards, loss_scaling=self.site.precision == "fp16")
        boundary = Boundary(
            evaluate=self._evaluate if parts.evaluate is not None else None,
            save=self._save,
            evaluate_every=config.train.evaluate_every,
            save_every=config.checkpoint.every_steps,
            last_saved=self.state.step if self.resumed_from is not None else -1,
        )
        with Prefetcher(
            parts.loader, first_step=self.state.step, last_step=parts.max_steps, depth=parts.prefetch_steps,
            threads=parts.prefetch_threads, limit_bytes=parts.prefetch_bytes,
        ) as steps:  # fmt: skip
            return train(
                engine=self.engine,
                steps=steps,
                state=self.state,
                max_steps=parts.max_steps,
                learning_rate=lambda step: (
                    peak * learning_rate_factor(config.schedule, step=step, max_steps=parts.max_steps)
                ),
                observers=[self.monitor],
                boundary=boundary,
                flags=lambda: StepFlags(stop=stop.reason is not None),
                guards=self.guards,
                on_fault=lambda verdict: self.monitor.event("guard", step=verdict.step + 1, **verdict.to_json()),
                on_damage=self._close_blocks,
            )

    def _close_blocks(self, step: int, blocks: tuple[tuple[str, int], ...]) -> None:
        """Every rank alike: do without damaged blocks from the first step that no rank can have prepared yet."""
        for source, block, since in self.parts.loader.close_blocks(blocks, from_step=step + self.parts.prefetch_steps):
            self.monitor.event("damaged_block", step=step, source=source, block=block, from_step=since)
            self._say(f"block {block} of source {source!r} is damaged: the run goes on without it from step {since}")

    def _evaluate(self, step: int) -> bool:
        """Collective. Score the held-out data; True when it is the best so far."""
        if self.parts.evaluate is None:
            return False
        started = time.perf_counter()
        metrics = self.parts.evaluate(self.engine)
        self.monitor.evaluated(step, {**metrics, "seconds": time.perf_counter() - started})
        deciding = self.parts.deciding_metric
        best = self.state.best_metric
        if deciding is None or step == 0 or (best is not None and metrics[deciding] <= best):
            return False
        self.state.best_metric, self.state.best_step = metrics[deciding], step
        return True

    def _save(self, step: int) -> None:
        """Collective. Save; a failed save is an event, and an error only when nothing comes after it."""
        started = time.perf_counter()
        protect = frozenset({self.state.best_step} if self.state.best_step is not None else ())
        try:
            self.site.control.together(self.lease.check if self.site.world.is_first else lambda: None)
            owned = self.fragments.owned(rank=self.site.world.rank, world_size=self.site.world.size)
            folder = self.writer.save(
                owned,
                self._manifest(step),
                config_yaml=self.config_yaml,
                tokenizer=self.parts.tokenizer_folder,
                protect=protect,
            )
        except CheckpointError as error:
            self.monitor.event("save_failed", step=step, error=str(error))
            if step >= self.parts.max_steps:
                raise StorageError(str(error)) from error
            _LOG.error("%s; training goes on, the next save will try again", error)
            return
        self.monitor.saved(self.state, seconds=time.perf_counter() - started, folder=folder.name)

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
            "environment": package_versions(),
            "states": STATES,
        }

    def _finish(self, finish: Callable[[Engine], None]) -> None:
        """Collective. Load the best checkpoint and let the stage use it."""
        best = self.state.best_step
        if best is not None and best != self.state.step:
            path = next((p for s, p in published_steps(self.writer.folder) if s == best), None)
            if path is not None:
                self._load(self.site.control.together(lambda: Checkpoint(path)))
        finish(self.engine)

    def _say(self, text: str) -> None:
        if self.site.world.is_first:
            _LOG.info("%s", text)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Alias → stored name, for parameters that share one tensor."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
