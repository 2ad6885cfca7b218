"""What the order, packing and loader need of a dataset, wherever its bytes lie: blocks of whole documents, by number.

`data.reader.ShardDataset` and `foreign.dataset.ForeignDataset` are such datasets. No logic here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Block:
    """Whole documents, back to back, without special tokens."""

    tokens: npt.NDArray[Any]
    """(tokens,) uint16 or uint32 ids, read-only."""
    ends: npt.NDArray[np.uint32]
    """(documents,) cumulative ends: document d is tokens[ends[d-1]:ends[d]]. Strictly increasing to len(tokens)."""


class BlockFacts(Protocol):
    """What a dataset says about itself; `data.manifest.Manifest` has these fields and more."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal training data."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Fingerprint of the tokenizer the ids belong to."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def frame_prefix(self) -> tuple[int, ...]:
        """Ids put before each piece of a document."""
        ...

    @property
    def frame_suffix(self) -> tuple[int, ...]:
        """Ids put after each piece of a document."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without framing."""
        ...

    @property
    def num_documents(self) -> int:
        """Documents."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks; they are numbered from 0."""
        ...


class BlockDataset(Protocol):
    """Blocks at random, from any thread."""

    @property
    def name(self) -> str:
        """Folder or URL, for messages."""
        ...

    @property
    def manifest(self) -> BlockFacts:
        """What it is made of."""
        ...

    def ends(self, block: int) -> npt.NDArray[np.uint32]:
        """(documents,) cumulative document ends of a block.

        Raises:
            DamagedBlockError: the bytes are not those that were written.
        """
        ...

    def read(self, block: int) -> Block:
        """One block, checked.

        Raises:
            DamagedBlockError: the bytes are not those that were written, also after a second try.
            StorageError: the store cannot be reached within its deadline.
        """
        ...

    def will_need(self, blocks: Sequence[int]) -> None:
        """The blocks that will be asked for next, soonest first; replaces what was said before. Only a hint."""
        ...

    def close(self) -> None:
        """Let go of files, connections and threads."""
        ...
