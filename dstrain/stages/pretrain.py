"""Pretraining: shards, plan, masks and a masked-language model, joined into one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError, DataError, ExitCode
from dstrain.base.world import World
from dstrain.data.loader import PackedLoader, RowSource, evaluation_batches
from dstrain.data.plan import Plan, num_micro_batches
from dstrain.data.reader import ShardDataset
from dstrain.data.row_index import rows_per_block
from dstrain.data.tokenizer import Tokenizer
from dstrain.models.encoders import MaskedLanguageModel
from dstrain.models.huggingface import build_masked_lm, facts, initialise
from dstrain.objectives.masking import Masking
from dstrain.objectives.mlm import MlmObjective
from dstrain.stages.assembly import Assembly, Site, seed_weights
from dstrain.stages.config import PretrainConfig
from dstrain.stages.initial import find_origin, special_tokens
from dstrain.stages.training import run_training
from dstrain.train.engine import Engine

_UNIGRAM_SAMPLE_TOKENS = 4_000_000


def pretrain(config: PretrainConfig, world: World) -> ExitCode:
    """Collective. Run (or go on with) a pretraining run."""
    return run_training(config, world, lambda site: assemble(config, site))


def assemble(config: PretrainConfig, site: Site) -> Assembly:
    """Build everything a pretraining run needs; local to a rank.

    Raises:
        DstrainError: data, tokenizer, model or settings do not fit together.
    """
    tokenizer = load_tokenizer(config.data.path)
    dataset = open_split(config.data.path, "train", tokenizer)
    source = row_source(config, dataset, tokenizer)
    rows = _rows(dataset, source, site.world)
    masking = _masking(config, tokenizer, stream="train")
    plan = Plan(
        rows, seed=config.seed, source="train", global_batch=config.train.global_batch,
        lanes=config.data.lanes, window_rows=config.data.window_rows,
    )  # fmt: skip
    micro = config.train.micro_batch
    loader = PackedLoader(source, plan, masking, corruption=masking.description, world=site.world, micro_batch=micro)
    model = build_model(config, tokenizer)
    epochs = config.train.max_steps / loader.steps_per_epoch
    return Assembly(
        stage="pretrain",
        model=model,
        objective=MlmObjective(),
        loader=loader,
        max_steps=config.train.max_steps,
        accumulation=num_micro_batches(config.train.global_batch, micro_batch=micro, world_size=site.world.size),
        tokenizer_folder=tokenizer.folder,
        prefetch_steps=config.data.prefetch_steps,
        evaluate=Evaluation(config, tokenizer, site.world, dataset),
        extra={"data_tokens": dataset.manifest.num_tokens, "data_documents": dataset.manifest.num_documents},
        mean_context=mean_context(dataset, config.data.sequence_length),
        notes=(
            f"data: {dataset.manifest.num_tokens / 1e6:.2f} M tokens in {dataset.manifest.num_documents} documents, "
            f"{plan.num_rows} rows of {config.data.sequence_length}, {plan.lanes} lanes; {epochs:.2f} epochs",
        ),
    )


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> MaskedLanguageModel:
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
    return model


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer kept with the shards."""
    if not path.is_dir():
        raise DataError(
            f"data.path: {path}: no such folder; build it with `dstrain shards build --input ... --tokenizer ... --out {path}`"
        )
    return Tokenizer.load(path / "tokenizer")


def open_split(path: Path, split: str, tokenizer: Tokenizer) -> ShardDataset:
    """Open train or validation and check that the tokenizer beside it is the one it was built with.

    Raises:
        DataError: the split is missing or damaged, or was built with another tokenizer.
    """
    dataset = ShardDataset(path / split)
    if dataset.manifest.tokenizer_sha256 != tokenizer.fingerprint:
        raise DataError(
            f"{tokenizer.folder}: is not the tokenizer that {path / split} was built with "
            f"(fingerprint {tokenizer.fingerprint[:12]}, the shards say {dataset.manifest.tokenizer_sha256[:12]}): "
            "put the right one back, or build the shards again"
        )
    return dataset


def row_source(config: PretrainConfig, dataset: ShardDataset, tokenizer: Tokenizer) -> RowSource:
    """Packed rows of a split."""
    return RowSource(
        dataset,
        sequence_length=config.data.sequence_length,
        word_starts=tokenizer.word_starts() if config.objective.whole_word else None,
        cache_bytes=config.data.cache_bytes,
    )


def _rows(dataset: ShardDataset, source: RowSource, world: World) -> npt.NDArray[np.int64]:
    return rows_per_block(
        dataset, num_blocks=len(dataset.blocks), fingerprint=dataset.manifest.fingerprint,
        sequence_length=source.sequence_length, frame_length=source.frame_length, may_write=world.is_first,
    )  # fmt: skip


def _masking(config: PretrainConfig, tokenizer: Tokenizer, *, stream: str) -> Masking:
    return Masking(
        config.objective, seed=config.seed, stream=stream, mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip


class Evaluation:
    """Masked loss and accuracy on the held-out split: the same rows and masks every time and at every world size."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, world: World, train_split: ShardDataset) -> None:
        """Read and mask the held-out rows once."""
        dataset = open_split(config.data.path, "validation", tokenizer)
        source = row_source(config, dataset, tokenizer)
        self._batches = evaluation_batches(
            source, _rows(dataset, source, world), _masking(config, tokenizer, stream="evaluation"),
            world=world, micro_batch=config.train.micro_batch, max_rows=config.train.evaluate_rows,
        )  # fmt: skip
        self._unigram = most_frequent_token(train_split, tokenizer)

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Collective. loss, accuracy, and the accuracy of always guessing the commonest training token."""
        loss, accuracy, targets = engine.evaluate(self._batches)
        hits = sum(int((b.labels == self._unigram).sum()) for b in self._batches)
        return {
            "loss": loss,
            "accuracy": accuracy,
            "unigram_accuracy": engine.control.sum([hits])[0] / max(1, targets),
            "targets": float(targets),
        }


def most_frequent_token(dataset: ShardDataset, tokenizer: Tokenizer) -> int:
    """The commonest ordinary token of the first few million training tokens: the unigram baseline's only guess."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for block in range(len(dataset.blocks)):
        counts += np.bincount(dataset.read(block).tokens, minlength=tokenizer.vocab_size)
        if counts.sum() >= _UNIGRAM_SAMPLE_TOKENS:
            break
    counts[list(tokenizer.special_ids)] = -1
    return int(counts.argmax())


def mean_context(dataset: ShardDataset, sequence_length: int) -> float:
    """Σ piece² / Σ piece over a sample of blocks: what attention really costs on packed documents."""
    total, squares = 0, 0
    for block in range(min(len(dataset.blocks), 64)):
        lengths = np.diff(dataset.ends(block).astype(np.int64), prepend=0).view(np.int64)
        full, tail = lengths // sequence_length, lengths % sequence_length
        total += int(lengths.sum())
        squares += int((full * sequence_length**2 + tail**2).sum())
    return squares / max(1, total)
