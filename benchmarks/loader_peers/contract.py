"""What a peer is to the measuring process (`process.py`): data written its own way, then batches.

A peer module has `NEEDS` (distributions whose versions are reported), `IMPORTS` (loaded before a clock starts), `convert(corpus, folder, settings)` and `Peer`. Batches
are whatever the peer hands to a training loop; `tokens` counts them, `numbers` reads the numbers of the `count` set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """One measurement, given to the peer's process as JSON."""

    variant: str
    form: str
    """Which of the peer's ways to feed tokens."""
    folder: Path
    """The peer's converted data."""
    corpus: Path
    """The neutral arrays."""
    row_length: int
    batch: int
    """Rows of a global batch."""
    workers: int = 0
    rank: int = 0
    world: int = 1
    seed: int = 1

    @property
    def rank_batch(self) -> int:
        return self.batch // self.world


class BasePeer(ABC):
    """Opened data at a position. Subclasses say how."""

    caches_epoch = False
    """Keeps what it decoded: the clock then runs over whole epochs, each begun with nothing kept, as with data that is
    larger than any cache."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def open(self, state: dict[str, Any] | None) -> None:
        """Get ready to iterate, from the start or from what `state` gave (another world may have given it)."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """This rank's batches up to the end of the epoch."""

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """Tokens of a batch, padding not counted."""

    @abstractmethod
    def numbers(self, batch: Any) -> list[int]:
        """Numbers of the documents in a batch of the `count` set."""

    def state(self, batches_done: int) -> dict[str, Any]:
        """What the peer's own documentation says to keep in a checkpoint."""
        return {"batches": batches_done, "world": self.settings.world}

    def length(self) -> int | None:
        """Batches of this rank's epoch, where the peer knows it."""
        return None
