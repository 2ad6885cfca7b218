"""Write documents of token ids as blocks in USTAR WebDataset shards, with index and manifest.

The bytes depend on the documents and their order alone: fixed times and owners, one npy header form, and where
compression is asked for, one zstd frame per block (equal bytes then need the same zstd library too). A shard is
`KEY.ends.npy`, `KEY.tokens.npy` (or `KEY.tokens.npy.zst`) for each block, then `__dstrain__/manifest` and `__dstrain__/index`, whose
names stock readers (`webdataset.WebDataset`, `datasets`, tar) skip or show as plain files. The manifest comes last: a
folder without one is no dataset. Knows neither text nor shuffling; the caller publishes the folder.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from dstrain.base.checksums import crc32
from dstrain.base.errors import DataError
from dstrain.base.storage import NewFile, make_directory, write_bytes
from dstrain.data.block_index import FLAG_ZSTD, INDEX_NAME, MAX_MEMBER_BYTES, RECORD, TAR_UNIT, ends_checksum
from dstrain.data.manifest import FORMAT_VERSION, Manifest, make_manifest, write_manifest

TAIL_MANIFEST = "__dstrain__/manifest"
TAIL_INDEX = "__dstrain__/index"
Compression = Literal["none", "zstd"]
"""How tokens are stored: as they are (local disks), or each block as a zstd frame (0.4 of the bytes, for object stores)."""
ZSTD_LEVEL = 3  # 0.37 of the bytes at 305 Mtok/s of reading; higher levels gain little on token ids
_NPY_HEADER_BYTES = 128
_ZSTD_GROWTH_BYTES = 1 << 18  # by which a frame of bytes without pattern may exceed them: 1/256 of the largest member


class ShardWriter:
    """Collects whole documents into blocks, blocks into shards, and closes them with index and manifest.

    Attributes:
        num_documents, num_tokens, num_blocks: written so far (a block counts when it is full).
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: dict[str, Any],
        block_tokens: int,
        shard_bytes: int,
        compression: Compression = "none",
        key_prefix: str = "",
    ):
        """Start an empty dataset.

        Args:
            folder: created if missing; belongs to this writer.
            identity: the manifest fields a tokenizer decides: tokenizer_sha256, vocab_size, dtype, frame_prefix,
                frame_suffix, special_ids.
            block_tokens: a block is closed before it would exceed this many tokens; a longer document is a block of
                its own.
            shard_bytes: a shard is closed before it would exceed this many bytes.
            compression: "none", or "zstd" to store each block's tokens as one zstd frame.
            key_prefix: put before every block's key, so that shards of several writers can be put together.

        Raises:
            DataError: the vocabulary does not fit the dtype.
        """
        self._folder = folder
        self._identity = identity
        self._dtype = np.dtype(identity["dtype"]).newbyteorder("<")
        if identity["vocab_size"] > np.iinfo(self._dtype).max + 1:
            raise DataError(f"vocab_size {identity['vocab_size']} does not fit the dtype {self._dtype.name}")
        self._block_tokens = block_tokens
        self._key_prefix = key_prefix
        self._shard_bytes = shard_bytes
        # One thread and a declared size: the same input gives the same frame, and a reader can bound what it unpacks.
        self._zstd = (
            zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True, threads=0)
            if compression == "zstd"
            else None
        )
        self._documents: list[npt.NDArray[Any]] = []
        self._pending_tokens = 0
        self._records: list[npt.NDArray[Any]] = []
        self._shard_records: list[tuple[int, ...]] = []
        self._shards: list[dict[str, Any]] = []
        self._file: NewFile | None = None
        self.num_documents = 0
        self.num_tokens = 0
        self.num_blocks = 0
        make_directory(folder)

    def add(self, tokens: npt.NDArray[Any]) -> None:
        """Append one document.

        Args:
            tokens: (length,) ids, length ≥ 1, all below the vocabulary size.

        Raises:
            DataError: an id does not belong to the vocabulary, or the document is larger than a block may ever be.
        """
        length = len(tokens)
        if length == 0:
            raise ValueError("an empty document cannot be stored")
        if int(tokens.max()) >= self._identity["vocab_size"]:
            raise DataError(f"id {int(tokens.max())} is not below vocab_size {self._identity['vocab_size']}")
        limit = (MAX_MEMBER_BYTES - _NPY_HEADER_BYTES - _ZSTD_GROWTH_BYTES) // self._dtype.itemsize
        if length > limit:
            raise DataError(
                f"a document has {length} tokens, a block holds at most {limit}: split the text into smaller documents"
            )
        if self._pending_tokens and self._pending_tokens + length > self._block_tokens:
            self._close_block()
        self._documents.append(tokens)
        self._pending_tokens += length
        self.num_documents += 1
        self.num_tokens += length

    def finish(self, *, provenance: dict[str, Any]) -> Manifest:
        """Close the last block and shard, write index and manifest."""
        if self._pending_tokens:
            self._close_block()
        if self._file is not None:
            self._close_shard()
        records = np.concatenate(self._records) if self._records else np.zeros(0, dtype=RECORD)
        content = {
            **self._identity,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_blocks": self.num_blocks,
            "index_sha256": write_bytes(self._folder / INDEX_NAME, records.tobytes()),
            "shards": self._shards,
        }
        manifest = make_manifest(content, provenance=provenance)
        write_manifest(self._folder, manifest)
        return manifest

    def abandon(self) -> None:
        """Let go of the open shard; the folder stays incomplete."""
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def _close_block(self) -> None:
        tokens = np.concatenate(self._documents).astype(self._dtype, copy=False)
        ends = np.cumsum([len(document) for document in self._documents]).astype("<u4")
        self._documents, self._pending_tokens = [], 0
        key = f"{self._key_prefix}{self.num_blocks:09d}"
        raw = _npy(tokens)
        tokens_payload = raw if self._zstd is None else self._zstd.compress(raw)
        suffix = "tokens.npy" if self._zstd is None else "tokens.npy.zst"
        # From the ends' payload to the tokens' payload, padding and the tokens' tar header included.
        lead = _padded(_npy(ends)) + _header(f"{key}.{suffix}", len(tokens_payload))
        stored = TAR_UNIT + len(lead) + len(_padded(tokens_payload))
        if self._file is not None and self._file.size_bytes + stored > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = NewFile(self._folder / f"shard-{len(self._shards):06d}.tar")
        self._file.write(_header(f"{key}.ends.npy", _NPY_HEADER_BYTES + ends.nbytes))
        offset = self._file.size_bytes + len(lead)
        self._file.write(lead)
        self._file.write(_padded(tokens_payload))
        checksum = crc32(tokens_payload, crc32(lead))
        flags = ends_checksum(lead[:-TAR_UNIT]) << 16 | (FLAG_ZSTD if self._zstd is not None else 0)
        sizes = (len(tokens_payload), len(raw))
        self._shard_records.append(
            (len(self._shards), offset, *sizes, len(tokens), len(ends), len(lead), checksum, flags)
        )
        self.num_blocks += 1

    def _close_shard(self) -> None:
        assert self._file is not None
        records = np.array(self._shard_records, dtype=RECORD)
        self._shard_records = []
        self._records.append(records)
        tail = json.dumps({"format_version": FORMAT_VERSION, **self._identity}, sort_keys=True).encode()
        for name, payload in ((TAIL_MANIFEST, tail), (TAIL_INDEX, records.tobytes())):
            self._file.write(_header(name, len(payload)) + _padded(payload))
        # Two empty headers end a tar; tar programs expect whole records of 20 units.
        end = self._file.size_bytes + 2 * TAR_UNIT
        self._file.write(bytes(2 * TAR_UNIT + -end % tarfile.RECORDSIZE))
        self._shards.append(
            {
                "name": self._file.path.name,
                "bytes": self._file.size_bytes,
                "sha256": self._file.finish(),
                "blocks": len(records),
                "tokens": int(records["tokens"].sum(dtype=np.int64)),
                "documents": int(records["docs"].sum(dtype=np.int64)),
            }
        )
        self._file = None


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    data = buffer.getvalue()
    # The design counts on the payload being aligned for mmap; numpy pads headers to 64 bytes, ours always to 128.
    assert len(data) == _NPY_HEADER_BYTES + array.nbytes
    return data


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mtime = 0
    member.mode = 0o644
    return member.tobuf(format=tarfile.USTAR_FORMAT, encoding="ascii", errors="strict")


def _padded(payload: bytes) -> bytes:
    return payload + bytes(-len(payload) % TAR_UNIT)
