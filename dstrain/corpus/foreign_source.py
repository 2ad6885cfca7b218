"""Texts of WebDataset tars as documents for the shard builder: `*.tar` files, or all tars of `wds:FOLDER`.

Each tar is one source, read in order after the same strict walk that indexing makes. The document is the samples' only
txt or JSON member (of JSON, the field that --text-field names). npy members are token ids already, and sets with several
such members need one named: `dstrain shards convert` takes both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dstrain.base.errors import DataError
from dstrain.corpus.sources import CorpusConfig, Document, OnBytes, Source
from dstrain.foreign.payloads import MemberChoice, detect_choice, read_text
from dstrain.foreign.ranges import read_range
from dstrain.foreign.samples import Samples, group_samples
from dstrain.foreign.tar_walk import walk_tar


def read_webdataset(source: Source, config: CorpusConfig, report: OnBytes) -> Iterator[Document]:
    """Yield the document of every sample of one tar, named `tar:key`.

    Raises:
        DataError: the tar is refused, or a member cannot be read; names tar and member.
    """
    path = Path(source.name)
    members = walk_tar(path)
    samples = group_samples(members, source=str(path))
    if not samples.keys:
        return
    choice = _choice(path, config, samples)
    done = 0
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for key, part in zip(samples.keys, samples.parts):
            number = part.get(choice.extension)
            if number is None:
                raise DataError(
                    f"{path}: sample {key!r} has no .{choice.extension} member, as the others have; leave such samples out "
                    "with `dstrain shards convert --skip-missing`"
                )
            start, size = members.offsets[number], members.sizes[number]
            if size > config.max_document_bytes:
                raise DataError(
                    f"{path}: {key!r} is longer than {config.max_document_bytes} bytes (--max-document-bytes)"
                )
            try:
                text = read_text(read_range(handle, start, start + size), choice)
            except ValueError as error:
                raise DataError(f"{path}: member '{key}.{choice.extension}': {error}") from None
            yield Document(f"{path}:{key}", text)
            report(start + size - done)
            done = start + size
        report(members.size_bytes - done)
    finally:
        os.close(handle)


def _choice(path: Path, config: CorpusConfig, samples: Samples) -> MemberChoice:
    choice = detect_choice(samples.extensions, source=str(path))
    if choice.form == "npy":
        raise DataError(
            f"{path}: its .{choice.extension} members hold token ids, not text: use `dstrain shards convert` for those"
        )
    if choice.form == "json":
        return choice.model_copy(update={"field": config.text_field})
    return choice
