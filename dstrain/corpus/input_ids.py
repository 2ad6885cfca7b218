"""Token ids of already tokenised inputs back to text, with the tokenizer that made them.

A door to `tokenizers`, beside `data/tokenizer.py`: that one loads tokenizers for training, which need a mask token; the
ones here (GPT-2's, Llama's) need not have one. Special tokens, such as the end of a document, leave no text.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from dstrain.base.errors import DataError
from dstrain.corpus.sources import CorpusConfig


class TokenDecoder:
    """Turns ids into text.

    Attributes:
        folder: where the tokenizer lies.
        vocab_size: one more than the largest id.
    """

    def __init__(self, folder: Path, backend: Any):
        self.folder = folder
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def text(self, ids: npt.NDArray[Any], *, place: str) -> str:
        """The text of one document's ids: (length,) of any integer dtype.

        Raises:
            DataError: an id is outside the vocabulary, so this is not the tokenizer that made it.
        """
        if len(ids) == 0:
            return ""
        least, greatest = int(ids.min()), int(ids.max())
        if least < 0 or greatest >= self.vocab_size:
            wrong = least if least < 0 else greatest
            raise DataError(
                f"{place}: token id {wrong} is outside the {self.vocab_size} ids of {self.folder}. "
                "Give --input-tokenizer the tokenizer that made this file"
            )
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=True))


def token_decoder(config: CorpusConfig, *, place: str, made_with: str | None = None) -> TokenDecoder:
    """The decoder that `config.input_tokenizer` names; loaded once per process.

    Args:
        config: names the folder.
        place: the file that needs it, for the message.
        made_with: what the file says of its tokenizer, for the message.

    Raises:
        DataError: none is named, or the folder holds no tokenizer.json.
    """
    if config.input_tokenizer is None:
        hint = f" (it says it was made with {made_with!r})" if made_with else ""
        raise DataError(
            f"{place}: holds token ids, not text{hint}. Name the folder of the tokenizer that made them with "
            "--input-tokenizer, to turn them back into text"
        )
    path = Path(config.input_tokenizer) / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. --input-tokenizer takes a folder with a tokenizer.json, as "
            "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes it"
        )
    return _load(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load(path: Path, _changed_ns: int) -> TokenDecoder:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise DataError(f"{path}: not a tokenizer definition: {error}") from error
    return TokenDecoder(path.parent, backend)


def ids_at(stream: Any, offset: int, count: int, dtype: np.dtype[Any], *, place: str) -> npt.NDArray[Any]:
    """Read `count` ids at a byte offset of an open file: (count,) of `dtype`.

    Raises:
        DataError: the file ends before.
    """
    stream.seek(offset)
    data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{place}: the file ends at byte {offset + len(data)}, inside this document: copy it again")
    return np.frombuffer(data, dtype=dtype)
