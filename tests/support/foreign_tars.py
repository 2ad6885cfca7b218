"""Foreign tars as other people's tools write them, for the tests of `dstrain.foreign`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> Path:
    """A plain tar of (name, payload) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def text_set(folder: Path, texts: Sequence[str], *, shards: int = 3, extension: str = "txt") -> list[Path]:
    """Texts dealt to shards in runs, each with a class label beside it, as image and caption sets have."""
    size = -(-len(texts) // shards)
    paths = []
    for number in range(shards):
        members = []
        for index, text in enumerate(texts[number * size : (number + 1) * size], start=number * size):
            data = json.dumps({"text": text, "id": index}) if extension == "json" else text
            members += [(f"part/{index:06d}.cls", b"1"), (f"part/{index:06d}.{extension}", data.encode())]
        paths.append(write_tar(folder / f"set-{number:03d}.tar", members))
    return paths


def npy_set(folder: Path, documents: Sequence[Any], *, shards: int = 3, dtype: str = "<u2") -> list[Path]:
    """Token ids as npy members, one document a sample."""
    size = -(-len(documents) // shards)
    return [
        write_tar(
            folder / f"tok-{number:03d}.tar",
            [
                (f"{index:06d}.tokens.npy", npy(np.asarray(ids, dtype=dtype)))
                for index, ids in enumerate(documents[number * size : (number + 1) * size], start=number * size)
            ],
        )
        for number in range(shards)
    ]
