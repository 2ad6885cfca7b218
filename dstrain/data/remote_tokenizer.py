"""A tokenizer folder behind a URL, brought to this machine: the library that loads tokenizers reads local files only."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from dstrain.base.errors import DataError
from dstrain.base.locations import RemoteUrl
from dstrain.base.protocols import ShouldLeave, never
from dstrain.base.storage import write_bytes
from dstrain.data.remote_store import RemoteStore
from dstrain.data.stores import StorageConfig

_REQUIRED = "tokenizer.json"
_OPTIONAL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
_LIMIT_BYTES = 64 << 20


def fetch_tokenizer(url: RemoteUrl, config: StorageConfig, *, should_leave: ShouldLeave = never) -> Path:
    """Copy the files of a tokenizer folder into a temporary folder that goes when this process ends.

    Args:
        url: the folder.
        config: time limits and credentials.
        should_leave: whether to raise `Interrupted` rather than wait on.

    Raises:
        DataError: tokenizer.json is missing there or larger than 64 MiB.
        StorageError: the store cannot be reached within its deadline.
    """
    store = RemoteStore(url, config, should_leave=should_leave)
    folder = Path(tempfile.mkdtemp(prefix="dstrain-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        for name in (_REQUIRED, *_OPTIONAL):
            try:
                size = store.size(name)
            except DataError:
                if name == _REQUIRED:
                    raise
                continue
            if size > _LIMIT_BYTES:
                raise DataError(f"{url}/{name}: {size} bytes are more than a tokenizer file may have ({_LIMIT_BYTES})")
            write_bytes(folder / name, store.read(name, 0, size) if size else b"")
    finally:
        store.close()
    return folder
