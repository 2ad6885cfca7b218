"""Look at a dataset folder: what is in it, and whether every byte of it is still what was written.

`inspect_dataset` answers in plain data from manifest, index and some blocks. `verify_dataset` reads everything and
lists every problem instead of stopping at the first. Both take one dataset or a folder that holds `train/` and
`validation/`. Repairs nothing and prints nothing.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError, DstrainError
from dstrain.base.progress import bar
from dstrain.base.storage import file_sha256
from dstrain.data.block_index import INDEX_NAME, RECORD, TAR_UNIT, check_records, parse_records, read_index
from dstrain.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from dstrain.data.reader import ShardDataset
from dstrain.data.shard_writer import TAIL_INDEX, TAIL_MANIFEST
from dstrain.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
_LENGTH_EDGES = (1, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_MAX_HISTOGRAM_BLOCKS = 4096


@dataclass(frozen=True)
class VerifyReport:
    """What verification found."""

    checked: tuple[Path, ...]
    """The dataset folders."""
    num_shards: int
    num_blocks: int
    num_bytes: int
    problems: tuple[str, ...]
    """One sentence per problem, naming file and block; empty when all is well."""

    @property
    def is_sound(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def find_datasets(path: Path) -> list[Path]:
    """The dataset folders at `path`: itself, or its `train` and `validation`.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        return [path]
    found = [path / split for split in SPLITS if (path / split / MANIFEST_NAME).exists()]
    if not found:
        read_manifest(path)  # raises with what is missing and the fix
    return found


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer folder kept with a dataset (beside it, or in the folder of both splits), if there is one."""
    for folder in (path / "tokenizer", path.parent / "tokenizer"):
        if folder.is_dir():
            return folder
    return None


def inspect_dataset(
    path: Path, *, num_samples: int = 3, sample_tokens: int = 40, open_split: Callable[[Path], Any] = ShardDataset
) -> dict[str, Any]:
    """Describe a dataset, or each split of a shards folder.

    Args:
        path: a dataset folder or the folder of both splits.
        num_samples: first documents to decode.
        sample_tokens: tokens of each shown.
        open_split: opens one split; another one than `ShardDataset` for datasets of another kind.

    Returns:
        JSON-able: `path`, `tokenizer` (folder or None) and `splits`, which maps a name to counts, sizes, `lengths`
        (document length histogram, tokens), `samples` (text) and `provenance`.

    Raises:
        DataError: there is no dataset, or what is read of it is damaged.
    """
    folders = find_datasets(path)
    folder = find_tokenizer(folders[0])
    tokenizer = Tokenizer.load(folder) if folder is not None else None
    splits = {
        found.name: _describe(open_split(found), tokenizer, num_samples=num_samples, sample_tokens=sample_tokens)
        for found in folders
    }
    return {"path": str(path), "tokenizer": str(folder) if folder is not None else None, "splits": splits}


def _describe(
    dataset: ShardDataset, tokenizer: Tokenizer | None, *, num_samples: int, sample_tokens: int
) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "blocks": manifest.num_blocks,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "fingerprint": manifest.fingerprint,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "tokenizer_matches": None if tokenizer is None else tokenizer.fingerprint == manifest.tokenizer_sha256,
        "frame_prefix": list(manifest.frame_prefix),
        "frame_suffix": list(manifest.frame_suffix),
        "lengths": length_histogram(dataset),
        "samples": _samples(dataset, tokenizer, num_samples=num_samples, sample_tokens=sample_tokens),
        "provenance": manifest.provenance,
    }


def length_histogram(dataset: ShardDataset) -> dict[str, Any]:
    """Document lengths in tokens: `mean`, `median`, `max` and `counts` per range, from at most 4096 blocks.

    Raises:
        DataError: a block is damaged.
    """
    step = max(1, -(-len(dataset.blocks) // _MAX_HISTOGRAM_BLOCKS))
    parts = [np.diff(dataset.ends(block), prepend=0) for block in range(0, len(dataset.blocks), step)]
    lengths = np.concatenate(parts).astype(np.int64) if parts else np.zeros(1, dtype=np.int64)
    edges = [*_LENGTH_EDGES, max(int(lengths.max()) + 1, _LENGTH_EDGES[-1] + 1)]
    counts, _ = np.histogram(lengths, bins=edges)
    names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges[:-1])] + [f"{edges[-2]}+"]
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
        "sampled_blocks": len(parts),
        "counts": dict(zip(names, counts.tolist())),
    }


def _samples(dataset: ShardDataset, tokenizer: Tokenizer | None, *, num_samples: int, sample_tokens: int) -> list[str]:
    if len(dataset.blocks) == 0:
        return []
    block = dataset.read(0)
    starts = [0, *block.ends[:-1].tolist()]
    shown = [
        block.tokens[s : min(e, s + sample_tokens)] for s, e in list(zip(starts, block.ends.tolist()))[:num_samples]
    ]
    return [tokenizer.decode(ids.tolist()) if tokenizer is not None else " ".join(map(str, ids)) for ids in shown]


def verify_dataset(path: Path, *, quiet: bool = False) -> VerifyReport:
    """Read all of a dataset, or of each split of a shards folder, and list every problem.

    Checked: manifest bounds and fingerprint; sha256 of index and shards; tar headers against index and each shard's own
    tail index; every block's checksums, document ends and ids; that the tokenizer is the one the ids belong to.

    Raises:
        DataError: there is no dataset at `path`.
    """
    folders = find_datasets(path)
    problems: list[str] = []
    shards = blocks = size = 0
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            problems.append(str(error))
            continue
        shards += len(manifest.shards)
        blocks += manifest.num_blocks
        size += sum(shard.bytes for shard in manifest.shards)
        with bar(total=_work(manifest), description=f"verifying {folder.name}", unit="B", quiet=quiet) as progress:
            problems += _verify_one(folder, manifest, progress)
        problems += _verify_tokenizer(folder, manifest)
    return VerifyReport(tuple(folders), shards, blocks, size, tuple(problems))


def _work(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards)


def _verify_one(folder: Path, manifest: Manifest, progress: Any) -> Iterator[str]:
    index = folder / INDEX_NAME
    sizes = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)
    dataset: ShardDataset | None = None
    try:
        records = read_index(index, num_blocks=manifest.num_blocks)
        check_records(records, shard_bytes=sizes, token_bytes=np.dtype(manifest.dtype).itemsize, source=str(index))
        dataset = ShardDataset(folder, check_shards=False)
    except DataError as error:
        yield f"{error} (its blocks were not checked)"
        records = np.zeros(0, dtype=RECORD)
    for number, shard in enumerate(manifest.shards):
        path = folder / shard.name
        blocks = np.flatnonzero(records["shard"] == number) if dataset is not None else np.zeros(0, dtype=np.int64)
        yield from _verify_shard(path, shard, records[blocks])
        if dataset is not None and path.is_file() and path.stat().st_size == shard.bytes:
            yield from _verify_blocks(dataset, blocks)
        progress.update(shard.bytes)
    known = {shard.name for shard in manifest.shards}
    for file in sorted(folder.glob("*.tar")):
        if file.name not in known:
            yield f"{file}: a shard that the manifest does not know"


def _verify_shard(path: Path, entry: ShardEntry, records: npt.NDArray[Any]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: this shard is missing"
        return
    size = path.stat().st_size
    if size != entry.bytes:
        yield f"{path}: {size} bytes, the manifest says {entry.bytes}"
    elif file_sha256(path) != entry.sha256:
        yield f"{path}: sha256 differs from the manifest"
    if not len(records):
        return
    try:
        members, tail = _members(path)
    except (tarfile.TarError, OSError, ValueError) as error:
        yield f"{path}: not readable as a tar: {error}"
        return
    offsets = records["off"].astype(np.int64)
    wanted = {int(o): int(n) for o, n in zip(offsets, records["len"])}
    suffixes = (".tokens.npy", ".tokens.npy.zst")
    found = {offset: length for name, (offset, length) in members.items() if name.endswith(suffixes)}
    if wanted != found:
        yield f"{path}: the tar's members do not lie where the index says"
    ends = {offset for name, (offset, _) in members.items() if name.endswith(".ends.npy")}
    if ends != {int(o) for o in offsets - records["ends_off"].astype(np.int64)}:
        yield f"{path}: the document ends do not lie where the index says"
    try:
        own = parse_records(tail, source=str(path)).copy()
        own["shard"] = records["shard"][0]  # a shard counts within the task that wrote it, before all were put together
        if not np.array_equal(own, records):
            yield f"{path}: the shard's own index differs from {INDEX_NAME}"
    except DataError as error:
        yield str(error)


def _members(path: Path) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Place and length of every member, and the tail index; reads headers only and extracts nothing."""
    members: dict[str, tuple[int, int]] = {}
    tail = b""
    with tarfile.open(path, "r:", format=tarfile.USTAR_FORMAT) as tar:
        for member in tar:
            if not member.isreg() or member.name in members:
                raise ValueError(f"{member.name!r} is no plain member or stands twice")
            members[member.name] = (member.offset_data, member.size)
            if member.name == TAIL_INDEX:
                stream = tar.extractfile(member)
                tail = stream.read(min(member.size, 1 << 30)) if stream is not None else b""
    if not {TAIL_MANIFEST, TAIL_INDEX} <= set(members):
        raise ValueError(f"ends before its {TAIL_INDEX} (tar units of {TAR_UNIT} bytes)")
    return members, tail


def _verify_blocks(dataset: ShardDataset, blocks: npt.NDArray[np.int64]) -> Iterator[str]:
    for block in blocks.tolist():
        yield from _verify_block(dataset, block)


def _verify_block(dataset: ShardDataset, block: int) -> Iterator[str]:
    try:
        dataset.ends(block)
        dataset.read(block)
    except DstrainError as error:
        yield str(error)


def _verify_tokenizer(folder: Path, manifest: Manifest) -> Iterator[str]:
    found = find_tokenizer(folder)
    if found is None:
        return
    try:
        tokenizer = Tokenizer.load(found)
    except DataError as error:
        yield str(error)
        return
    if tokenizer.fingerprint != manifest.tokenizer_sha256:
        yield (
            f"{found}: not the tokenizer {folder.name} was built with "
            f"(fingerprint {tokenizer.fingerprint[:12]}, the manifest says {manifest.tokenizer_sha256[:12]})"
        )
