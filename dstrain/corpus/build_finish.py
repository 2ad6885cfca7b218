"""Join what reduce tasks wrote into one dataset a split, add card and tokenizer, and publish all with one rename.

Shards are renamed, not copied, and every step can be repeated: a finish that was killed goes on where it was. Only a
split of which each task has a few blocks (the held-out one, as a rule) is written anew, so that one block of it is cut
short and not one a task. Nothing stands under the output's name before everything does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.base.errors import DataError
from dstrain.base.storage import make_directory, publish_directory, remove_directory, sync_directory, write_bytes
from dstrain.corpus.build_config import TOKENIZER, TRAIN, VALIDATION, dataset_identity, settings_identity
from dstrain.corpus.build_plan import LEAST_BLOCKS
from dstrain.corpus.build_tasks import Job, Task
from dstrain.corpus.card import CardCounts, CardFacts, write_card
from dstrain.data.block_index import INDEX_NAME, RECORD, parse_records
from dstrain.data.manifest import Manifest, make_manifest, read_manifest, write_manifest
from dstrain.data.reader import ShardDataset
from dstrain.data.shard_writer import ShardWriter
from dstrain.data.tokenizer import Tokenizer

_CARD_TITLE = "Pretraining shards"  # not the folder's name: equal requests give equal bytes wherever they are written


def finish_build(
    job: Job, out: Path, *, request: dict[str, Any], request_key: str, maps: Sequence[Task], reduces: Sequence[Task]
) -> dict[str, int]:
    """Publish `out` from finished tasks and return its counts.

    Raises:
        DataError: no document has a token, or the work folder was touched.
        StorageError: the disk is full or failing.
    """
    counts = CardCounts()
    for task in (*maps, *reduces):
        counts.merge(CardCounts.from_json(job.work.result(task.name)["counts"], place=task.name))
    if counts.documents[TRAIN] == 0:
        raise DataError("the corpus gives no tokens: every document is empty for this tokenizer")
    found = {
        "documents_read": counts.documents_read,
        "empty": counts.dropped["empty"],
        "duplicates": counts.dropped["duplicate"],
        "train_documents": counts.documents[TRAIN],
        "validation_documents": counts.documents[VALIDATION],
    }
    tokenizer = Tokenizer.load(job.tokenizer_folder)
    final = job.work.path / f"final-{request_key}"
    folders = [job.work.data(job.work.result(task.name)["data"]) for task in reduces]
    splits = {}
    for split in (TRAIN, VALIDATION):
        if counts.documents[split]:
            provenance = {"split": split, "request": request, "counts": found}
            parts = [folder / split for folder in folders]
            join = _write_anew if _is_ragged(parts) else _join
            manifest = join(parts, final / split, job=job, tokenizer=tokenizer, provenance=provenance)
            size = sum(shard.bytes for shard in manifest.shards)
            splits[split] = {"shards": len(manifest.shards), "blocks": manifest.num_blocks, "bytes": size}
    tokenizer.copy_to(final / TOKENIZER)
    facts = {"vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype.name, "fingerprint": tokenizer.fingerprint}
    write_card(final, counts, CardFacts(_CARD_TITLE, facts, settings_identity(job.config), splits))
    if out.exists() and any(out.iterdir()):
        remove_directory(out)
    publish_directory(final, out)
    return found


def _is_ragged(folders: Sequence[Path]) -> bool:
    """Whether the parts have so few blocks that the last one of each, which is not full, makes much padding."""
    blocks = sum(read_manifest(folder).num_blocks for folder in folders)
    return len(folders) > 1 and blocks < LEAST_BLOCKS * len(folders)


def _write_anew(
    folders: Sequence[Path], final: Path, *, job: Job, tokenizer: Tokenizer, provenance: dict[str, Any]
) -> Manifest:
    """The documents of all parts in their order, in blocks that end where they are full."""
    if final.exists():
        remove_directory(final)  # of a finish that was killed; the parts are all there still
    writer = ShardWriter(
        final, identity=dataset_identity(tokenizer), block_tokens=job.config.block_tokens,
        shard_bytes=job.config.shard_bytes, compression=job.config.compression,
    )  # fmt: skip
    try:
        for folder in folders:
            if not read_manifest(folder).num_blocks:
                continue
            part = ShardDataset(folder)
            for number in range(part.manifest.num_blocks):
                block = part.read(number)
                for document in np.split(block.tokens, block.ends[:-1].astype(np.int64)):
                    writer.add(document)
        return writer.finish(provenance=provenance)
    except BaseException:
        writer.abandon()
        raise


def _join(
    folders: Sequence[Path], final: Path, *, job: Job, tokenizer: Tokenizer, provenance: dict[str, Any]
) -> Manifest:
    make_directory(final)
    records = [np.zeros(0, dtype=RECORD)]
    shards: list[dict[str, Any]] = []
    totals = {"num_tokens": 0, "num_documents": 0, "num_blocks": 0}
    for folder in folders:
        part = read_manifest(folder)
        found = parse_records((folder / INDEX_NAME).read_bytes(), source=str(folder / INDEX_NAME)).copy()
        found["shard"] += len(shards)
        records.append(found)
        for shard in part.shards:
            entry = shard.model_dump(mode="json") | {"name": f"shard-{len(shards):06d}.tar"}
            _move(folder / shard.name, final / entry["name"], size=shard.bytes)
            shards.append(entry)
        for name in totals:
            totals[name] += getattr(part, name)
    sync_directory(final)
    index = write_bytes(final / INDEX_NAME, np.concatenate(records).tobytes())
    content = {**dataset_identity(tokenizer), **totals, "index_sha256": index, "shards": shards}
    manifest = make_manifest(content, provenance=provenance)
    write_manifest(final, manifest)
    return manifest


def _move(shard: Path, final: Path, *, size: int) -> None:
    if shard.exists():
        os.replace(shard, final)
    if not final.exists() or final.stat().st_size != size:
        raise DataError(f"{shard}: gone or cut; the work folder was touched: delete it and build again")
