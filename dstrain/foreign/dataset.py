"""An index over foreign tars as blocks of whole documents, by number: the same Protocol as the block shards.

npy members are read in the calling thread, at hundreds of Mtok/s; text is tokenised as it is read, by spawned processes
that work ahead of the plan if `workers` says so. A token leaves only if its block's checksum matches and each document
has the length the plan was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.data.blocks import Block
from dstrain.foreign.ahead import ReadAhead
from dstrain.foreign.block_reader import BlockReader
from dstrain.foreign.manifest import ForeignManifest


class ForeignDataset:
    """One split of an index; implements `data.blocks.BlockDataset`.

    Attributes:
        path: the split's folder.
        manifest: its checked table of contents.
        blocks: (num_blocks,) records of `manifest.BLOCK`.
    """

    def __init__(self, path: Path, *, workers: int = 0, check_shards: bool = True) -> None:
        """Check index and shards; no payload is read.

        Args:
            path: the split's folder, e.g. `dstrain-index/train`.
            workers: processes that tokenise ahead; 0 tokenises in the calling thread. Unused for npy members.
            check_shards: False leaves missing and cut shards to the first read of one of their blocks.

        Raises:
            DataError: naming the file and the fix.
        """
        self.path = Path(path)
        self._workers = workers
        self._reader = BlockReader(self.path, check_shards=check_shards)
        self.manifest: ForeignManifest = self._reader.manifest
        self.blocks: npt.NDArray[Any] = self._reader.blocks
        self._ahead = ReadAhead(self.path, workers=workers) if workers > 0 and self._is_text else None

    @property
    def name(self) -> str:
        """The folder, for messages."""
        return str(self.path)

    @property
    def notes_folder(self) -> Path:
        """Where small files about the dataset may be kept."""
        return self.path

    @property
    def _is_text(self) -> bool:
        return self.manifest.member.form != "npy"

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        """(documents,) cumulative document ends of a block; from the index, no shard is read."""
        return self._reader.ends(block)

    def read(self, block: int) -> Block:
        """One block, checked; safe from any thread.

        Raises:
            IndexError: there is no such block.
            DamagedBlockError: the shard's bytes are not those that were indexed; names shard and samples.
            DataError: the shard is missing or has another size.
        """
        ready = self._ahead.take(block) if self._ahead is not None else None
        return ready if ready is not None else self._reader.read(block)

    def will_need(self, blocks: Sequence[int]) -> None:
        """The blocks that will be asked for next: worker processes begin with them."""
        if self._ahead is not None:
            self._ahead.want(blocks)

    def close(self) -> None:
        """Close files and stop worker processes; a later read opens files again and works alone."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._reader.close()

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens files and workers of its own.
        return {"path": self.path, "workers": self._workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ForeignDataset.__init__(self, state["path"], workers=state["workers"])
