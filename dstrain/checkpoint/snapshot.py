"""One rank's safetensors file, kept in host memory: the buffer that training is stopped for while fragments are copied in.

The buffer is laid out as the file's bytes will be, so that a writer hashes and writes it as it stands. It is allocated once,
pinned when the fragments are on a GPU, its pages touched, and used again as long as the fragments keep their places; another
layout makes a new one. Does not write and starts no thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dstrain.base.errors import CheckpointError
from dstrain.checkpoint.manifest import Fragment, fragment_key

Listing = tuple[tuple[str, str, int, int], ...]
"""(parameter, state, offset, elements) of every fragment, in file order."""

_ALIGNMENT = 64
_ELEMENT_BYTES = 4
_HEADER_LIMIT = 100_000_000  # safetensors refuses larger ones


class Snapshot:
    """The fragments of one rank as they were at the last `take`."""

    def __init__(self) -> None:
        self._layout: tuple[Listing, bool] | None = None
        self._header = b""
        self._body = torch.empty(0)
        self._places: list[Tensor] = []

    @property
    def listing(self) -> Listing:
        """What the last `take` copied."""
        return () if self._layout is None else self._layout[0]

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self._header) + self._body.numel() * _ELEMENT_BYTES

    @property
    def address(self) -> int:
        """Where the buffer lies; the same while it is used again."""
        return self._body.data_ptr()

    @torch.no_grad()
    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy the fragments; when this returns they may change.

        Args:
            fragments: 1-D fp32 tensors on one device.

        Raises:
            CheckpointError: a fragment is not 1-D fp32, or there is no host memory for the copy.
        """
        chosen = list(fragments)
        for f in chosen:
            if f.tensor.dtype != torch.float32 or f.tensor.dim() != 1:
                raise CheckpointError(
                    f"{f.name} {f.state}: a fragment is a flat fp32 tensor, not {f.tensor.dtype} of {f.tensor.dim()} dimensions"
                )
        device = next((f.tensor.device for f in chosen if f.tensor.device.type == "cuda"), None)
        layout = tuple((f.name, f.state, f.offset, f.tensor.numel()) for f in chosen), device is not None
        if layout != self._layout:
            self._prepare(*layout)
        if device is None:
            # One plain copy, not torch's: its thread team meets at a barrier for every tensor, and where the machine has other
            # work to do (loader threads, a neighbour) those meetings cost ten times the copy.
            for place, f in zip(self._places, chosen):
                np.copyto(place.numpy(), f.tensor.numpy())
        else:
            _copy_from_gpu(self._places, [f.tensor for f in chosen], device)

    def pieces(self, chunk_bytes: int) -> Iterator[memoryview]:
        """The file's bytes in order, header first, in pieces of at most `chunk_bytes`; views, no copies."""
        yield memoryview(self._header)
        if not self._body.numel():  # a rank that holds nothing
            return
        body = memoryview(self._body.numpy()).cast("B")  # type: ignore[arg-type]
        for at in range(0, len(body), chunk_bytes):
            yield body[at : at + chunk_bytes]

    def _prepare(self, listing: Listing, pinned: bool) -> None:
        """Lay out the file and make the buffer; the old one is given back first, so that there are never two."""
        self._layout, self._places, self._body = None, [], torch.empty(0)
        numel = sum(count for *_, count in listing)
        self._header = _header(listing)
        try:
            # Pinned memory is resident; other pages are touched here, once, and not while training waits for a later copy.
            self._body = torch.empty(numel, dtype=torch.float32, pin_memory=pinned)
            self._body.numpy().fill(0)
        except RuntimeError as error:
            raise CheckpointError(
                f"no host memory for a copy of {numel * _ELEMENT_BYTES / 1e9:.2f} GB of training state: "
                f"use more ranks or a machine with more memory ({str(error).splitlines()[0]})"
            ) from None
        at = 0
        for *_, count in listing:
            self._places.append(self._body[at : at + count])
            at += count
        self._layout = listing, pinned


def _copy_from_gpu(places: list[Tensor], sources: list[Tensor], device: torch.device) -> None:
    """All copies on a stream of their own, after what the training stream has queued, and one wait at the end."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for place, source in zip(places, sources):
            place.copy_(source, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
    done.synchronize()


def _header(listing: Listing) -> bytes:
    """A safetensors header; blanks at its end put the tensors on a cache line."""
    entries: dict[str, object] = {}
    at = 0
    for name, state, offset, count in listing:
        end = at + count * _ELEMENT_BYTES
        entries[fragment_key(name, state, offset)] = {"dtype": "F32", "shape": [count], "data_offsets": [at, end]}
        at = end
    if len(entries) != len(listing):
        raise CheckpointError(
            "two fragments of one parameter begin at the same element: this rank would store one of them only"
        )
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _HEADER_LIMIT:
        raise CheckpointError(
            f"{len(listing)} fragments on one rank need a header of {len(text)} bytes: safetensors reads {_HEADER_LIMIT}"
        )
    return len(text).to_bytes(8, "little") + text
