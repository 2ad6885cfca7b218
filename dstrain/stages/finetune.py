"""Fine-tuning: a task's examples and a classifier on pretrained weights, through the same engine, loop and checkpoints."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError, ExitCode
from dstrain.base.logs import get_logger
from dstrain.base.protocols import Objective, ShouldLeave
from dstrain.base.storage import write_json
from dstrain.base.world import World
from dstrain.data.plan import num_micro_batches
from dstrain.data.tokenizer import Tokenizer
from dstrain.health.signals import StopRequest
from dstrain.models.encoders import SequenceClassifier
from dstrain.models.huggingface import build_classifier, choose_attention_kernel, facts, initialise
from dstrain.objectives.supervised import ClassificationObjective, RegressionObjective
from dstrain.stages.assembly import Assembly, Site, seed_weights
from dstrain.stages.config import FinetuneConfig
from dstrain.stages.initial import Origin, find_origin, special_tokens
from dstrain.stages.training import run_training
from dstrain.tasks.encoded import EncodedExamples, encode
from dstrain.tasks.examples import Examples, TaskData, read_task
from dstrain.tasks.loader import EvaluationBatch, ExampleLoader, evaluation_batches
from dstrain.tasks.metrics import baseline_metrics
from dstrain.tasks.predictions import assemble as assemble_outputs
from dstrain.tasks.predictions import score, write_predictions
from dstrain.train.engine import Engine

METRICS_FILE = "metrics.json"

_LOG = get_logger(__name__)


def finetune(config: FinetuneConfig, world: World, *, stop: StopRequest | None = None) -> ExitCode:
    """Collective. Run (or go on with) a fine-tuning run; leaves metrics.json and predictions/ when complete."""
    return run_training(config, world, lambda site: assemble(config, site), stop=stop)


def assemble(config: FinetuneConfig, site: Site) -> Assembly:
    """Build everything a fine-tuning run needs; local to a rank.

    Raises:
        DstrainError: files, tokenizer, model or settings do not fit together.
    """
    origin = find_origin(config.model.init_from)
    tokenizer = _tokenizer(config, origin)
    task = read_task(config.task)
    model, fresh = _model(config, origin, tokenizer, task)
    encoded = encode(task.train, tokenizer, max_length=config.task.max_length)
    train_ = config.train
    loader = ExampleLoader(
        encoded,
        seed=config.seed,
        global_batch=train_.global_batch,
        micro_batch=train_.micro_batch,
        world=site.world,
        pads=model.attention == "padded",
    )
    max_steps = train_.max_steps or max(1, math.ceil(train_.epochs * loader.steps_per_epoch))
    scoring = Scoring(config, site.world, task, tokenizer)
    return Assembly(
        stage="finetune",
        model=model,
        objective=_objective(config),
        loader=loader,
        max_steps=max_steps,
        accumulation=num_micro_batches(train_.global_batch, micro_batch=train_.micro_batch, world_size=site.world.size),
        row_length=config.task.max_length,
        tokenizer_folder=tokenizer.folder,
        prefetch_steps=config.prefetch_steps,
        evaluate=scoring.validation_metrics,
        deciding_metric=config.task.chosen_metric,
        finish=scoring.finish,
        finished_file=METRICS_FILE,
        extra={"task": config.task.kind, "labels": list(task.labels or ()), "init_from": config.model.init_from or ""},
        mean_context=float(np.square(encoded.lengths).sum() / max(1, encoded.lengths.sum())),
        notes=(
            choose_attention_kernel(model, config.model.attention_kernel, device=site.device, precision=site.precision),
            f"task: {len(task.train)} training and {len(task.validation)} validation examples"
            + (f", labels {', '.join(task.labels)}" if task.labels else ""),
            f"new parameters: {', '.join(fresh) or 'none'}" if origin else "random weights: model.init_from is not set",
        ),
    )


def _tokenizer(config: FinetuneConfig, origin: Origin | None) -> Tokenizer:
    folder = config.tokenizer or (origin.tokenizer_folder if origin else None)
    if folder is None:
        raise ConfigError(f"tokenizer: {config.model.init_from} brings no tokenizer.json; give a tokenizer folder")
    return Tokenizer.load(Path(folder))


def _model(
    config: FinetuneConfig, origin: Origin | None, tokenizer: Tokenizer, task: TaskData
) -> tuple[SequenceClassifier, list[str]]:
    seed_weights(config.seed)
    model = build_classifier(
        config.model, num_labels=task.num_outputs, labels=task.labels or (), regression=task.labels is None,
        vocab_size=tokenizer.vocab_size, special=special_tokens(tokenizer),
        architecture=origin.architecture if origin else None,
    )  # fmt: skip
    limit = facts(model).max_positions
    if limit is not None and config.task.max_length > limit:
        raise ConfigError(
            f"task.max_length: {config.task.max_length} is longer than the model's {limit} positions; shorten it"
        )
    fresh = initialise(model, origin.weights(), source=origin.source) if origin is not None else []
    return model, fresh


def _objective(config: FinetuneConfig) -> Objective:
    return ClassificationObjective() if config.task.kind == "classification" else RegressionObjective()


class Scoring:
    """Evaluates a task's splits, the same at every world size."""

    def __init__(self, config: FinetuneConfig, world: World, task: TaskData, tokenizer: Tokenizer) -> None:
        """Encode the splits to be scored."""
        self._config, self._world, self._task = config, world, task
        self._splits = {"validation": task.validation} | ({"test": task.test} if task.test is not None else {})
        self._batches = {
            name: self._prepare(encode(s, tokenizer, max_length=config.task.max_length))
            for name, s in self._splits.items()
        }

    def _prepare(self, encoded: EncodedExamples) -> list[EvaluationBatch]:
        return evaluation_batches(encoded, world=self._world, micro_batch=self._config.train.micro_batch)

    def outputs(self, engine: Engine, split: str, should_leave: ShouldLeave | None = None) -> npt.NDArray[np.float32]:
        """Collective. (N, C) outputs of a split, in the order of its examples, on every rank."""
        batches = self._batches[split]
        logits = engine.predict([b.batch for b in batches], should_leave=should_leave)
        mine = [(b.indices.tolist(), x.tolist()) for b, x in zip(batches, logits)]
        parts = [(np.asarray(i), np.asarray(o)) for rank in engine.control.gather_json(mine) for i, o in rank]
        return assemble_outputs(parts, num_examples=len(self._splits[split]))

    def validation_metrics(self, engine: Engine, should_leave: ShouldLeave | None = None) -> dict[str, float]:
        """Collective. Metrics of the validation split."""
        return score(self.outputs(engine, "validation", should_leave), self._task.validation, labels=self._task.labels)

    def finish(self, engine: Engine, should_leave: ShouldLeave | None = None) -> None:
        """Collective. Score and predict every split with the best weights; write predictions/ and metrics.json last."""
        results: dict[str, Any] = {"metric": self._config.task.chosen_metric}
        for name, examples in self._splits.items():
            outputs = self.outputs(engine, name, should_leave)
            results[name] = self._scored(outputs, examples)
            engine.control.together(functools.partial(self._write, name, outputs, examples))
        engine.control.together(lambda: self._conclude(results))

    def _write(self, split: str, outputs: npt.NDArray[np.float32], examples: Examples) -> None:
        """Rank 0: the predictions of a split."""
        if self._world.is_first:
            path = self._config.run_folder / "predictions" / f"{split}.jsonl"
            write_predictions(path, outputs, examples, labels=self._task.labels)

    def _conclude(self, results: dict[str, Any]) -> None:
        """Rank 0: metrics.json, which says that all is done."""
        if not self._world.is_first:
            return
        write_json(self._config.run_folder / METRICS_FILE, results)
        best = results["validation"]["metrics"][self._config.task.chosen_metric]
        _LOG.info(
            "best validation %s %.4f; predictions and metrics.json are in %s",
            results["metric"],
            best,
            self._config.run_folder,
        )

    def _scored(self, outputs: npt.NDArray[np.float32], examples: Examples) -> dict[str, Any]:
        if not examples.has_labels:
            return {"examples": len(examples)}
        classes = len(self._task.labels) if self._task.labels else None
        return {
            "examples": len(examples),
            "metrics": score(outputs, examples, labels=self._task.labels),
            "baseline": baseline_metrics(self._task.train.labels, examples.labels, num_classes=classes),
        }
