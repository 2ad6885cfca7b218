"""Write the finished index: tables and manifest of both splits, the tokenizer, then one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.base.storage import make_directory, publish_directory, remove_directory, write_bytes
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.manifest import BLOCK, BLOCKS_NAME, SAMPLE, SAMPLES_NAME, write_manifest
from dstrain.foreign.payloads import MemberChoice
from dstrain.foreign.shard_index import SPLITS, ShardIndex

TOKENIZER = "tokenizer"


def publish_index(
    out: Path,
    staging: Path,
    root: Path,
    shards: Sequence[Path],
    indexes: Sequence[ShardIndex],
    tokenizer: Tokenizer,
    choice: MemberChoice,
    provenance: dict[str, Any],
) -> None:
    """Write both splits and the tokenizer into `staging` and give them their final name.

    Args:
        out: the final folder.
        staging: scratch beside it; removed.
        root: the folder that the shards lie under.
        shards: the tars, in order.
        indexes: what each gave.
        tokenizer: copied into the index.
        choice: where the documents are.
        provenance: request and counts, kept for people and to recognise a finished index.

    Raises:
        StorageError: the disk is full or failing.
    """
    ready = staging / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    names = [shard.relative_to(root).as_posix() for shard in shards]
    # Shards and index that move together stay together; an index elsewhere names the shards' place.
    below = root in (out, *out.parents)
    for split in SPLITS:
        if any(len(index.samples[split]) for index in indexes):
            make_directory(ready / split)
            content = _write_tables(ready / split, names, indexes, split)
            content |= {
                "tokenizer_sha256": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "dtype": tokenizer.dtype.name,
                "frame_prefix": list(tokenizer.frame_prefix),
                "frame_suffix": list(tokenizer.frame_suffix),
                "special_ids": list(tokenizer.special_ids),
                "member": choice.model_dump(mode="json"),
                "root": os.path.relpath(root, out / split) if below else str(root),
                "provenance": {"split": split, **provenance},
            }
            write_manifest(ready / split, content)
    tokenizer.copy_to(ready / TOKENIZER)
    if out.exists():
        remove_directory(out) if any(out.iterdir()) else out.rmdir()
    publish_directory(ready, out)
    shutil.rmtree(staging, ignore_errors=True)


def _write_tables(folder: Path, names: Sequence[str], indexes: Sequence[ShardIndex], split: str) -> dict[str, Any]:
    listed, tables, first = [], [], 0
    for number, (name, index) in enumerate(zip(names, indexes)):
        samples, blocks = index.samples[split], index.blocks[split].copy()
        blocks["shard"] = number
        blocks["first"] += np.uint64(first)
        first += len(samples)
        tables.append(blocks)
        listed.append(
            {
                "name": name,
                "bytes": index.bytes,
                "sha256": index.sha256,
                "blocks": len(blocks),
                "tokens": int(blocks["tokens"].sum(dtype=np.int64)),
                "documents": len(samples),
            }
        )
    all_blocks = np.concatenate(tables).astype(BLOCK, copy=False)
    all_samples = np.concatenate([index.samples[split] for index in indexes]).astype(SAMPLE, copy=False)
    return {
        "num_tokens": sum(entry["tokens"] for entry in listed),
        "num_documents": len(all_samples),
        "num_blocks": len(all_blocks),
        "index_sha256": write_bytes(folder / BLOCKS_NAME, all_blocks.tobytes()),
        "samples_sha256": write_bytes(folder / SAMPLES_NAME, all_samples.tobytes()),
        "shards": listed,
    }
