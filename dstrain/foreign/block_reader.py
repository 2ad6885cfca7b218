"""Bytes of one block of foreign samples to checked token ids: pread, CRC-32, decode, tokenise, compare lengths.

Used by the dataset in the calling thread and by its worker processes alike. Safe from any thread. Keeps no blocks and
knows no order.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.checksums import crc32
from dstrain.base.errors import DamagedBlockError, DataError
from dstrain.data.blocks import Block
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.manifest import ForeignManifest, read_manifest, read_tables
from dstrain.foreign.payloads import read_text
from dstrain.foreign.ranges import UNIT, Int64, find_ranges, read_range, slice_members

MAX_OPEN_FILES = 128
_MEND = "Copy the shard again, or index again with `dstrain shards index --overwrite` if it was changed on purpose"


class BlockReader:
    """Reads blocks of one split of an index.

    Attributes:
        path: the split's folder.
        manifest: its checked table of contents.
        samples, blocks: records of `manifest.SAMPLE` and `manifest.BLOCK`.
    """

    def __init__(self, path: Path, *, check_shards: bool = True) -> None:
        """Check manifest, tables and the presence and size of every shard.

        Raises:
            DataError: naming the file and the fix.
        """
        self.path = Path(path)
        self.manifest: ForeignManifest = read_manifest(self.path)
        self.samples, self.blocks = read_tables(self.path, self.manifest)
        self.root = Path(os.path.normpath(self.path.absolute() / self.manifest.root))
        self._dtype = np.dtype(self.manifest.dtype)
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        for shard in self.manifest.shards if check_shards else ():
            if shard.blocks:
                self._check_size(self.root / shard.name, shard.bytes)

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        """(documents,) cumulative ends, from the index alone."""
        tokens = self._records(block)["tokens"]
        return np.cumsum(tokens, dtype=np.uint32)

    def read(self, block: int) -> Block:
        """One block, checked; a failed check is tried once more, in case the file system handed out a stale page.

        Raises:
            IndexError: there is no such block.
            DamagedBlockError: the bytes are not those that were indexed, or give other tokens.
            DataError: the shard is missing or has another size.
        """
        try:
            return self._read(block)
        except DamagedBlockError:
            with self._lock:
                self._files.clear()
            return self._read(block)

    def check(self, block: int) -> None:
        """Compare a block's bytes with its checksum, without making tokens of them.

        Raises:
            DamagedBlockError: they differ.
            DataError: the shard is missing or has another size.
        """
        self._checked_bytes(block)

    def close(self) -> None:
        """Close the shards' files; a later read opens them again."""
        with self._lock:
            self._files.clear()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept with the index.

        Raises:
            DataError: it is missing or another one.
        """
        with self._tokenizer_lock:
            if self._tokenizer is None:
                folder = next(
                    (f for f in (self.path / "tokenizer", self.path.parent / "tokenizer") if f.is_dir()), None
                )
                loaded = Tokenizer.load(folder if folder is not None else self.path.parent / "tokenizer")
                if loaded.fingerprint != self.manifest.tokenizer_sha256:
                    raise DataError(
                        f"{loaded.folder}: is not the tokenizer the index was made with; put the right one back, or "
                        "index again"
                    )
                self._tokenizer = loaded
            return self._tokenizer

    def _records(self, block: int) -> npt.NDArray[Any]:
        if not 0 <= block < len(self.blocks):
            raise IndexError(f"block {block} of {len(self.blocks)}")
        record = self.blocks[block]
        first = int(record["first"])
        return self.samples[first : first + int(record["samples"])]

    def _read(self, block: int) -> Block:
        records = self._records(block)
        data, ranges = self._checked_bytes(block)
        if self.manifest.member.form == "npy":
            tokens = self._npy_tokens(block, records, data, ranges)
        else:
            offsets, lengths = records["off"].astype(np.int64), records["len"].astype(np.int64)
            tokens = self._text_tokens(block, records, slice_members(data, ranges, offsets, lengths))
        if int(tokens.max()) >= self.manifest.vocab_size:
            raise self._damaged(block, f"id {int(tokens.max())} is not below vocab_size {self.manifest.vocab_size}")
        tokens = tokens.astype(self._dtype, copy=False)
        tokens.flags.writeable = False
        return Block(tokens=tokens, ends=self.ends(block))

    def _checked_bytes(self, block: int) -> tuple[bytes, Int64]:
        records = self._records(block)
        offsets, lengths = records["off"].astype(np.int64), records["len"].astype(np.int64)
        ranges = find_ranges(offsets, lengths, begin=int(self.blocks[block]["begin"]))
        data = self._pread(block, ranges)
        if crc32(data) != int(self.blocks[block]["crc32"]):
            raise self._damaged(block, "the checksum (crc32) does not match")
        return data, ranges

    def _npy_tokens(self, block: int, records: npt.NDArray[Any], data: bytes, ranges: Int64) -> npt.NDArray[Any]:
        # The checksum vouches for the headers that the indexer read; only the ids are looked at here.
        widths = records["width"]
        lead = records["lead"].astype(np.int64)
        starts, sizes = records["off"].astype(np.int64) + lead, records["len"].astype(np.int64) - lead
        slices = slice_members(data, ranges, starts, sizes)
        if (widths == widths[0]).all():
            return np.frombuffer(b"".join(slices), dtype=f"<u{widths[0]}")
        parts = [np.frombuffer(ids, dtype=f"<u{width}") for ids, width in zip(slices, widths.tolist())]
        return np.concatenate([part.astype(np.uint64) for part in parts])

    def _text_tokens(self, block: int, records: npt.NDArray[Any], payloads: list[memoryview]) -> npt.NDArray[Any]:
        texts = []
        for number, payload in enumerate(payloads):
            try:
                texts.append(read_text(payload, self.manifest.member))
            except ValueError as error:
                raise self._damaged(block, str(error), sample=number) from None
        documents = self.tokenizer().encode_documents(texts)
        for number, (ids, expected) in enumerate(zip(documents, records["tokens"].tolist())):
            if len(ids) != expected:
                raise self._damaged(
                    block,
                    f"its text gives {len(ids)} tokens, the index says {expected}: the tokenizers library is another "
                    "version than at indexing, so index again",
                    sample=number,
                )
        return np.concatenate(documents)

    def _pread(self, block: int, ranges: Int64) -> bytes:
        file = self._open(int(self.blocks[block]["shard"]))
        try:
            parts = [read_range(file.handle, start, stop) for start, stop in ranges.tolist()]
        except OSError as error:
            raise self._damaged(block, f"reading failed: {error}") from error
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) != int((ranges[:, 1] - ranges[:, 0]).sum()):
            raise self._damaged(block, "the shard ends in the middle of it")
        return data

    def _open(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                entry = self.manifest.shards[shard]
                path = self.root / entry.name
                self._check_size(path, entry.bytes)
                file = _OpenFile(path)
                self._files[shard] = file
                # A file dropped here closes when its last reader is done with it.
                while len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return file

    def _check_size(self, path: Path, expected: int) -> None:
        try:
            size = path.stat().st_size
        except OSError:
            raise DataError(
                f"{path}: this shard is missing; the index in {self.path} needs the tars at {self.root}. Put them back, "
                "or index them where they are now"
            ) from None
        if size != expected:
            raise DataError(f"{path}: {size} bytes, the index says {expected}: cut or replaced. {_MEND}")

    def _damaged(self, block: int, reason: str, *, sample: int | None = None) -> DamagedBlockError:
        record = self.blocks[block]
        shard = self.manifest.shards[int(record["shard"])]
        first = int(record["first"])
        before = sum(entry.documents for entry in self.manifest.shards[: int(record["shard"])])
        low, high = first - before, first - before + int(record["samples"]) - 1
        place = f"sample {low + sample}" if sample is not None else f"samples {low} to {high}"
        if sample is not None:
            place += f" at byte {int(self.samples[first + sample]['off']) - UNIT}"
        message = f"{self.root / shard.name}: block {block} ({place} of this split) is damaged: {reason}. {_MEND}"
        return DamagedBlockError(message, dataset=str(self.path), block=block)


class _OpenFile:
    """A file descriptor that closes itself when the last user lets go."""

    def __init__(self, path: Path) -> None:
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error}. {_MEND}") from error

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            os.close(handle)
