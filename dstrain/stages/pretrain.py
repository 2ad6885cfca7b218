"""Pretraining: shards, plan, masks and a masked-language model, joined into one run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dstrain.base.errors import ConfigError, DamagedBlockError, ExitCode
from dstrain.base.protocols import MicroBatch, ShouldLeave
from dstrain.base.world import World
from dstrain.data.evaluation import evaluation_batches
from dstrain.data.tokenizer import Tokenizer
from dstrain.health.signals import StopRequest
from dstrain.models.dstrain_encoder import DstrainMaskedLanguageModel
from dstrain.models.encoders import MaskedLanguageModel
from dstrain.models.huggingface import build_masked_lm, choose_attention_kernel, facts, initialise
from dstrain.models.layer_routes import LayerRoutes
from dstrain.objectives.mlm import MlmObjective
from dstrain.stages.assembly import Assembly, Site, seed_weights
from dstrain.stages.config import PretrainConfig
from dstrain.stages.initial import find_origin, grow_from_smaller, special_tokens
from dstrain.stages.training import run_training
from dstrain.stages.training_data import (
    VALIDATION,
    TrainingData,
    count_rows,
    mean_context,
    open_split,
    open_training_data,
    row_source,
    source_paths,
    training_masking,
)
from dstrain.train.compiling import choose_compiling
from dstrain.train.engine import Engine

_UNIGRAM_SAMPLE_TOKENS = 4_000_000


def pretrain(config: PretrainConfig, world: World, *, stop: StopRequest | None = None) -> ExitCode:
    """Collective. Run (or go on with) a pretraining run; see `training.run_training`."""
    return run_training(config, world, lambda site: assemble(config, site), stop=stop)


def assemble(config: PretrainConfig, site: Site) -> Assembly:
    """Build everything a pretraining run needs; local to a rank.

    Raises:
        DstrainError: data, tokenizer, model or settings do not fit together.
        Interrupted: asked to stop while waiting for a remote store.
    """
    data = open_training_data(config, site.world, should_leave=site.should_leave)
    model = build_model(config, data.tokenizer)
    compiling = choose_compiling(config.engine, device=site.device, unpadded=model.attention == "unpadded")
    routes = _routes(config, model, few_shapes=compiling.enabled)  # tries the model out here, on the CPU
    kernel = choose_attention_kernel(model, config.model.attention_kernel, device=site.device, precision=site.precision)
    return Assembly(
        stage="pretrain",
        model=model,
        at_step=routes.begin if routes else None,
        layer_shares=routes.layer_shares if routes else None,
        objective=MlmObjective(compiled=compiling.enabled),
        loader=data.loader,
        max_steps=config.train.max_steps,
        accumulation=data.loader.num_micro_batches(0),
        row_length=config.data.sequence_length,
        tokenizer_folder=data.tokenizer.folder,
        prefetch_steps=config.data.prefetch_steps,
        prefetch_threads=config.data.threads,
        prefetch_bytes=config.data.prefetch_bytes,
        evaluate=Evaluation(config, data, site),
        extra={"data_tokens": data.num_tokens, "data_documents": data.num_documents},
        mean_context=mean_context(data.datasets.values(), config.data.sequence_length),
        notes=(kernel, *_notes(config, data)),
    )


def _routes(
    config: PretrainConfig, model: MaskedLanguageModel | DstrainMaskedLanguageModel, *, few_shapes: bool
) -> LayerRoutes | None:  # fmt: skip
    """What training steps leave out of the model, if anything."""
    if config.token_dropping is None and config.layer_dropping is None:
        return None
    return LayerRoutes(
        model, tokens=config.token_dropping, layers=config.layer_dropping, seed=config.seed, few_shapes=few_shapes
    )


def _notes(config: PretrainConfig, data: TrainingData) -> Iterator[str]:
    plan = data.loader.plan
    yield (
        f"data: {data.num_tokens / 1e6:.2f} M tokens in {data.num_documents} documents, "
        f"{plan.num_rows} rows of {config.data.sequence_length}, {plan.lanes} lanes"
    )
    for name, order in zip(data.spec.names, plan.orders):
        yield f"source {name}: {order.num_rows} rows, {data.epochs[name]:.2f} epochs"


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> MaskedLanguageModel | DstrainMaskedLanguageModel:
    """The model with the weights a fresh run starts from.

    Raises:
        ConfigError: the model's positions are fewer than the rows are long, or `init_from` does not fit.
    """
    origin = find_origin(config.model.init_from)
    seed_weights(config.seed)
    model = build_masked_lm(
        config.model, vocab_size=tokenizer.vocab_size, special=special_tokens(tokenizer),
        architecture=origin.architecture if origin else None,
    )  # fmt: skip
    limit = facts(model).max_positions
    if limit is not None and config.data.sequence_length > limit:
        raise ConfigError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the model's {limit} positions; "
            "shorten it or raise model.config.max_position_embeddings"
        )
    if origin is not None:
        initialise(model, origin.weights(), source=origin.source)
    elif config.model.init_from_smaller is not None:
        grow_from_smaller(model, config.model.init_from_smaller, tokenizer)
    return model


class Evaluation:
    """Masked loss and accuracy on the held-out splits: the same rows and masks every time and at every world size.

    Each source gives rows in proportion to its first weight; with several, each one's loss is told apart.
    """

    def __init__(self, config: PretrainConfig, data: TrainingData, site: Site) -> None:
        """Read and mask the held-out rows once."""
        masking = training_masking(config, data.tokenizer, stream="evaluation")
        self._batches: dict[str, list[MicroBatch]] = {}
        shares = dict(zip(data.spec.names, data.spec.phases[0].shares))
        for name, path in source_paths(config.data).items():
            most = config.train.evaluate_rows
            if most is not None:
                most = -(-most * shares[name] // sum(shares.values()))
            if most == 0:
                continue
            dataset = open_split(path, VALIDATION, data.tokenizer, config.data, should_leave=site.should_leave)
            source = row_source(config, name, dataset, data.tokenizer)
            self._batches[name] = evaluation_batches(
                source, count_rows(source, dataset, site.world), masking,
                world=site.world, micro_batch=config.train.micro_batch, max_rows=most,
            )  # fmt: skip
        self._unigram = most_frequent_token(data)

    def __call__(self, engine: Engine, should_leave: ShouldLeave | None = None) -> dict[str, float]:
        """Collective. loss, accuracy, and the accuracy of always guessing the commonest training token."""
        scores = {name: engine.evaluate(batches, should_leave=should_leave) for name, batches in self._batches.items()}
        hits = sum(int((b.labels == self._unigram).sum()) for batches in self._batches.values() for b in batches)
        targets = sum(count for _, _, count in scores.values())
        metrics = {
            "loss": sum(loss * count for loss, _, count in scores.values()) / max(1, targets),
            "accuracy": sum(accuracy * count for _, accuracy, count in scores.values()) / max(1, targets),
            "unigram_accuracy": engine.control.sum([hits])[0] / max(1, targets),
            "targets": float(targets),
        }
        if len(scores) > 1:
            metrics |= {f"loss_{name}": loss for name, (loss, _, _) in scores.items()}
        return metrics


def most_frequent_token(data: TrainingData) -> int:
    """The commonest ordinary token of the first few million training tokens: the unigram baseline's only guess."""
    counts = np.zeros(data.tokenizer.vocab_size, dtype=np.int64)
    for dataset in data.datasets.values():
        seen = 0
        for block in range(dataset.manifest.num_blocks):
            try:
                tokens = dataset.read(block).tokens
            except DamagedBlockError:  # the loader's policy judges it when its rows come
                continue
            counts += np.bincount(tokens, minlength=data.tokenizer.vocab_size)
            seen += len(tokens)
            if seen >= _UNIGRAM_SAMPLE_TOKENS // len(data.datasets):
                break
    counts[list(data.tokenizer.special_ids)] = -1
    return int(counts.argmax())
