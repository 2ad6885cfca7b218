"""Which tasks a build consists of: pure functions of the inputs and settings, so that every process finds the same ones.

Scan: one for each input file. Map: parts of inputs gathered to a size. Reduce: ranges of hash buckets, as many as the
text that the maps found asks for. Nothing here depends on how many processes work, so neither does any byte of the
output.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.corpus.buckets import num_buckets
from dstrain.corpus.build_config import BUILDER_VERSION, ShardBuildConfig, content_key, settings_identity
from dstrain.corpus.build_tasks import Task, file_state
from dstrain.corpus.card import source_label
from dstrain.corpus.sources import COMPRESSED, Source

_EXPANSION = 4
"""Bytes of text that a byte of compressed or columnar input may give; sizes buckets and the estimate of scratch space."""
_PACKED_SUFFIXES = (*COMPRESSED, ".parquet")
_TEXT_BYTES_PER_TOKEN = 4  # English, WordPiece of 32768 ids
_LEAST_MAP_BYTES, _MOST_MAP_BYTES = 1 << 20, 256 << 20
_MAP_TASKS = 256  # wanted: enough for hundreds of processes, few enough to list
LEAST_BLOCKS = 10
"""Blocks a reduce task writes at least: its last one is cut short, so fewer would leave blocks that pack badly."""
_REDUCE_TASKS = 64  # from here on, a task gets two full shards before there are more tasks


@dataclass(frozen=True)
class Sizes:
    """How large a build is expected to be."""

    stored_bytes: int
    """Of the inputs whose size is known."""
    text_bytes: int | None
    """Estimate; None where an input's size is unknown."""
    map_target_bytes: int
    buckets: int


def estimate_sizes(sources: Sequence[Source]) -> Sizes:
    """Sizes from the inputs' names and lengths alone; powers of two, so that small changes keep finished tasks valid."""
    stored = sum(source.size_bytes or 0 for source in sources)
    text = sum((source.size_bytes or 0) * (_EXPANSION if _is_packed(source) else 1) for source in sources)
    is_known = all(source.size_bytes is not None for source in sources)
    target = 1 << max(0, stored // _MAP_TASKS).bit_length()
    return Sizes(
        stored_bytes=stored,
        text_bytes=text if is_known else None,
        map_target_bytes=max(_LEAST_MAP_BYTES, min(_MOST_MAP_BYTES, target)),
        buckets=num_buckets(text if is_known else None),
    )


def num_groups(text_bytes: int, *, buckets: int, config: ShardBuildConfig, token_bytes: int) -> int:
    """Reduce tasks for an amount of text."""
    block_text = config.block_tokens * _TEXT_BYTES_PER_TOKEN
    shard_text = config.shard_bytes // token_bytes * _TEXT_BYTES_PER_TOKEN
    wanted = min(text_bytes // (LEAST_BLOCKS * block_text), max(_REDUCE_TASKS, text_bytes // (2 * shard_text)))
    return max(1, min(buckets, wanted))


def scan_tasks(sources: Iterable[Source], sizes: Sizes, config: ShardBuildConfig) -> list[Task]:
    """One task for each file: its hash, and where it can be cut."""
    corpus = settings_identity(config)["corpus"]
    tasks = []
    for source in sources:
        if source.is_file:
            # An absolute name, because the tasks of a cluster may start in other folders.
            source = dataclasses.replace(source, name=os.path.abspath(source.name))
            payload = {
                "source": dataclasses.asdict(source),
                "state": file_state(source.name),
                "target_bytes": sizes.map_target_bytes,
            }
            name = f"scan-{content_key([BUILDER_VERSION, payload, corpus])}"
            tasks.append(Task("scan", name, source.size_bytes or 0, payload))
    return tasks


def map_tasks(
    sources: Sequence[Source], scans: Mapping[str, dict[str, Any]], sizes: Sizes, config: ShardBuildConfig
) -> list[Task]:
    """Parts of inputs gathered to `sizes.map_target_bytes`.

    Args:
        sources: whole inputs.
        scans: result of each file's scan, by absolute path.
        sizes: of the build.
        config: the settings.
    """
    settings = settings_identity(config)
    decisive = [settings[key] for key in ("corpus", "filters", "filter_packages", "seed")]
    tasks = []
    for entries in _gathered(_parts(sources, scans), sizes.map_target_bytes):
        content = [
            [entry["label"], entry["sha256"], entry["source"]["start"], entry["source"]["stop"]] for entry in entries
        ]
        name = f"map-{content_key([BUILDER_VERSION, sizes.buckets, decisive, content])}"
        weight = sum(entry["source"]["size_bytes"] or 0 for entry in entries)
        tasks.append(Task("map", name, weight, {"parts": entries, "buckets": sizes.buckets}))
    return tasks


def reduce_plan(
    maps: Sequence[Task],
    results: Sequence[Mapping[str, Any]],
    sizes: Sizes,
    *,
    config: ShardBuildConfig,
    token_bytes: int,
) -> dict[str, Any]:
    """What all reduce tasks need to know, from the results of all map tasks."""
    text = sum(result["text_bytes"] for result in results)
    return {
        "maps": [task.name for task in maps],
        "buckets": sizes.buckets,
        "groups": num_groups(text, buckets=sizes.buckets, config=config, token_bytes=token_bytes),
        "held_out_below": held_out_below([result["splits"] for result in results], config.validation_fraction),
        "text_bytes": text,
        "documents": sum(result["documents"] for result in results),
    }


def reduce_tasks(plan_name: str, plan: Mapping[str, Any]) -> list[Task]:
    """Ranges of buckets; `plan_name` is the marker under which `reduce_plan`'s answer is kept."""
    weight = plan["text_bytes"] // plan["groups"]
    return [
        Task("reduce", f"reduce-{content_key([plan_name, group])}", weight, {"plan": plan_name, "group": group})
        for group in range(plan["groups"])
    ]


def held_out_below(bounds: Iterable[Sequence[int | None]], fraction: float) -> int:
    """Documents with a split hash below this are held out: at least one, never all, if two differ.

    Args:
        bounds: least and greatest split hash of each map task; None for a task without documents.
        fraction: wanted share, 0 for none.
    """
    known = [value for pair in bounds for value in pair if value is not None]
    if fraction == 0 or not known or min(known) == max(known):
        return 0
    return min(max(int(fraction * (1 << 64)), min(known) + 1), max(known))


def _is_packed(source: Source) -> bool:
    return Path(source.name).suffix.lower() in _PACKED_SUFFIXES


def _parts(sources: Sequence[Source], scans: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for source in sources:
        if not source.is_file:
            yield {"source": dataclasses.asdict(source), "state": [], "label": source.name, "sha256": ""}
            continue
        path = os.path.abspath(source.name)
        for part in scans[path]["parts"]:
            known = {key: scans[path][key] for key in ("state", "sha256")}
            yield {"source": part, "label": source_label(source), **known}


def _gathered(entries: Iterable[dict[str, Any]], target_bytes: int) -> Iterator[list[dict[str, Any]]]:
    gathered: list[dict[str, Any]] = []
    size = 0
    for entry in entries:
        gathered.append(entry)
        size += entry["source"]["size_bytes"] or target_bytes
        if size >= target_bytes:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered
