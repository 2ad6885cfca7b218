"""Every measurement, by name: which peer, which of its forms, what the form delivers, with how many workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One row of the result table."""

    peer: str
    """Module `peer_<peer>.py`."""
    form: str
    delivers: str
    """blocks, documents, rows (arrays of tokens) or train (packed or grouped, masked, collated)."""
    workers: int = 0
    data: str = ""
    """Which conversion it reads; the peer's name where empty."""
    resumes: bool = True
    """Measured for resume; a form that differs only in workers or delivery is not measured again."""
    counted: bool = False
    """Also counted for lost and repeated rows."""
    memory_only: bool = False
    """Only there for its memory: its speed says nothing about the format."""

    @property
    def converted(self) -> str:
        return self.data or self.peer


VARIANTS: dict[str, Variant] = {
    "dstrain blocks": Variant("dstrain", "blocks", "blocks", resumes=False),
    "webdataset, same blocks": Variant("webdataset", "blocks", "blocks", data="dstrain"),
    "webdataset, same blocks, 2 workers": Variant("webdataset", "blocks", "blocks", 2, data="dstrain", resumes=False),
    "webdataset, document .npy": Variant("webdataset", "documents", "documents"),
    "webdataset, document .npy, shuffle": Variant("webdataset", "shuffled", "documents", counted=True),
    "webdataset, document .npy, shuffle, 2 workers": Variant("webdataset", "shuffled", "documents", 2, resumes=False),
    "WebLoader, document .npy, shuffle, 4 workers": Variant(
        "webdataset", "shuffled", "documents", 4, resumes=False, memory_only=True
    ),
    "dstrain rows": Variant("dstrain", "rows", "rows", counted=True),
    "LitData TokensLoader": Variant("litdata", "rows", "rows", counted=True),
    "LitData TokensLoader, 2 workers": Variant("litdata", "rows", "rows", 2, resumes=False),
    "MosaicML Streaming": Variant("mosaicml", "rows", "rows", counted=True),
    "MosaicML Streaming, 2 workers": Variant("mosaicml", "rows", "rows", 2, resumes=False),
    "HF datasets map": Variant("huggingface", "map", "rows", counted=True),
    "HF datasets iterable, shuffle": Variant("huggingface", "iterable", "rows", counted=True),
    "torch memmap, DataLoader": Variant("memmap", "loader", "rows", counted=True),
    "torch memmap, batch gather": Variant("memmap", "gather", "rows"),
    "dstrain train": Variant("dstrain", "train", "train"),
    "dstrain train, prefetch thread": Variant("dstrain", "prefetch", "train", resumes=False),
    "HF run_mlm": Variant("huggingface", "mlm", "train", counted=True),
    "HF run_mlm, 2 workers": Variant("huggingface", "mlm", "train", 2, resumes=False),
    "torch memmap, hand-written masking": Variant("memmap", "mlm", "train", resumes=False),
}
"""Whole blocks or documents against each other, then rows, then what a training step takes."""

OURS = {"blocks": "dstrain blocks", "documents": "dstrain blocks", "rows": "dstrain rows", "train": "dstrain train"}
