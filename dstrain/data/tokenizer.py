"""The one door to `transformers` and `tokenizers` for text: train a tokenizer, load a folder, text to ids and back.

A tokenizer is a folder that `AutoTokenizer.from_pretrained` reads offline. `Tokenizer` narrows it to what is needed:
documents without special tokens (the packer frames them), examples with special tokens, which ids begin a word, and a
fingerprint that ties shards and checkpoints to the tokenizer they were made with. Text is data: a literal "[MASK]" in a
corpus becomes ordinary pieces, never the special id. Knows nothing of files of text, shards or models; no remote code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dstrain.base.errors import DataError
from dstrain.base.logs import get_logger
from dstrain.base.progress import bar
from dstrain.base.storage import make_directory, publish_directory, read_json, remove_directory, write_bytes, write_json

_LOG = get_logger(__name__)

TokenizerKind = Literal["wordpiece", "bpe", "unigram"]
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TRAINING_NAME = "training.json"
"""Provenance of a tokenizer that dstrain trained, beside tokenizer.json."""
_ALPHABET_LIMIT = 1000
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_GLUE = "Ġ▁"


@dataclass(frozen=True)
class Encoded:
    """One fine-tuning example with its special tokens."""

    tokens: npt.NDArray[np.int32]
    """(length,) ids."""
    token_types: npt.NDArray[np.int32]
    """(length,) 0 for the first text, 1 for the second where the tokenizer tells them apart."""


class Tokenizer:
    """A fast Hugging Face tokenizer folder, reduced to what an encoder's pretraining needs.

    Attributes:
        folder: where it was loaded from.
        vocab_size: one more than the largest id.
        fingerprint: SHA-256 of the canonical `tokenizer.json` (key order, padding and truncation do not count).
        mask_id, pad_id, cls_id, sep_id: the special ids an encoder needs.
        special_ids: every special id, ascending.
        frame_prefix, frame_suffix: ids put before and after one document, e.g. ([CLS],) and ([SEP],).
    """

    def __init__(self, folder: Path, fast: Any):
        self.folder = folder
        self._fast = fast
        definition = _definition(folder, fast)
        self._model: dict[str, Any] = definition["model"]
        self._text = json.dumps(definition, ensure_ascii=False)
        self.fingerprint: str = hashlib.sha256(
            json.dumps(definition, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
        ).hexdigest()
        self._backend = _plain_backend(fast)
        # Truncation is a setting of the backend, so examples get a backend of their own.
        self._example_backend = _plain_backend(fast)
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self._vocab.values()) + 1
        self.mask_id = self._required("mask", fast.mask_token_id)
        self.pad_id = self._required("pad", fast.pad_token_id)
        self.cls_id = self._required("cls", fast.bos_token_id if fast.cls_token_id is None else fast.cls_token_id)
        self.sep_id = self._required("sep", fast.eos_token_id if fast.sep_token_id is None else fast.sep_token_id)
        added = {int(i) for i, token in fast.added_tokens_decoder.items() if token.special}
        self.special_ids: tuple[int, ...] = tuple(sorted(added | {int(i) for i in fast.all_special_ids}))
        self._ordinary = self._ordinary_ids(fast.unk_token_id)
        self.frame_prefix, self.frame_suffix = self._frame()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a tokenizer folder, offline and without running code from it.

        Raises:
            DataError: the folder is missing, holds no fast tokenizer, or lacks a special token an encoder needs.
        """
        path = Path(path)
        if not path.is_dir():
            raise DataError(
                f"{path}: no such tokenizer folder. Train one with `dstrain tokenizer train --input ... --out {path}`, "
                "or download one and give its folder"
            )
        if not any((path / name).exists() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
            raise DataError(
                f"{path}: holds no tokenizer (tokenizer.json is missing): give the folder that "
                "`dstrain tokenizer train` or `save_pretrained` wrote"
            )
        try:
            fast = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise DataError(f"{path}: transformers cannot load this tokenizer: {error}") from error
        if not getattr(fast, "is_fast", False):
            raise DataError(
                f"{path}: {type(fast).__name__} is a slow tokenizer; dstrain needs a fast one (a tokenizer.json). "
                "Convert it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
            )
        return cls(path, fast)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What shards store ids in: uint16 where the vocabulary fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Tell which ids begin a new word: (vocab_size,) bool.

        WordPiece: no `##`. Byte-level BPE: a leading white space or punctuation mark. SentencePiece: a leading `▁`.
        Special ids always begin a word. A document's first token does too, whatever this table says.
        """
        starts = np.ones(self.vocab_size, dtype=np.bool_)
        kind = self._model.get("type")
        prefix = self._model.get("continuing_subword_prefix") or ("##" if kind == "WordPiece" else "")
        for token, index in self._vocab.items():
            if prefix:
                starts[index] = not token.startswith(prefix)
            elif kind in ("BPE", "Unigram"):
                starts[index] = _begins_word(token)
        starts[list(self.special_ids)] = True
        return starts

    def encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Tokenise documents without special tokens or truncation: one 1-D array of `dtype` per text."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._ordinary[np.array(encoding.ids, dtype=np.int64)] for encoding in encodings]

    def encode_examples(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int
    ) -> list[Encoded]:
        """Tokenise single texts or pairs with special tokens, cut to `max_length` tokens from the longer text first.

        Raises:
            DataError: texts and pairs differ in number, or `max_length` leaves no room beside the special tokens.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise DataError(f"{len(texts)} first texts but {len(pairs)} second texts")
        num_special = self._example_backend.num_special_tokens_to_add(pairs is not None)
        if max_length <= num_special:
            raise DataError(f"max_length={max_length} leaves no room for text: {num_special} special tokens are added")
        self._example_backend.enable_truncation(max_length, strategy="longest_first")
        inputs: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs))
        encodings = self._example_backend.encode_batch(inputs, add_special_tokens=True)
        return [Encoded(np.array(e.ids, dtype=np.int32), np.array(e.type_ids, dtype=np.int32)) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens shown by name."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def token(self, index: int) -> str:
        """Name of an id, e.g. `##ing`."""
        return str(self._backend.id_to_token(index))

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's own files, byte for byte, into a new or existing folder."""
        make_directory(folder)
        if not (self.folder / "tokenizer.json").exists():
            self._fast.save_pretrained(str(folder))
            return
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.suffix in _COPIED_SUFFIXES and _is_tokenizer_file(file.name):
                write_bytes(folder / file.name, file.read_bytes())

    def _required(self, name: str, index: int | None) -> int:
        if index is None:
            raise DataError(
                f"{self.folder}: this tokenizer has no {name} token, which masked-language-model training needs. "
                f"Name one in tokenizer_config.json ('{name}_token'), or train one with `dstrain tokenizer train`"
            )
        return int(index)

    def _ordinary_ids(self, unknown: int | None) -> npt.NDArray[Any]:
        # SentencePiece models may hold "<mask>" as a piece like any other; in a document it is an unknown word.
        table = np.arange(self.vocab_size, dtype=self.dtype)
        if unknown is not None:
            table[list(self.special_ids)] = unknown
        return table

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        framed = list(self._backend.encode("a", add_special_tokens=True).ids)
        plain = list(self._backend.encode("a", add_special_tokens=False).ids)
        for start in range(len(framed) - len(plain) + 1):
            if plain and framed[start : start + len(plain)] == plain:
                return tuple(framed[:start]), tuple(framed[start + len(plain) :])
        raise DataError(f"{self.folder}: cannot tell which special tokens stand before and after a text")


def _definition(folder: Path, fast: Any) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    definition = read_json(path) if path.exists() else json.loads(fast.backend_tokenizer.to_str())
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer definition (no 'model' in it)")
    return {key: value for key, value in definition.items() if key not in ("padding", "truncation")}


def _plain_backend(fast: Any) -> Any:
    backend = Backend.from_str(fast.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _begins_word(token: str) -> bool:
    first = token[:1]
    # Byte-level BPE writes tab, newline and carriage return as ĉ, Ċ, č; other ASCII punctuation stands for itself.
    return first in _GLUE or first in "ĉĊč" or (first.isascii() and not first.isalnum())


def _is_tokenizer_file(name: str) -> bool:
    return "token" in name or name.startswith(("vocab", "merges", "spiece", "sentencepiece", "chat_template"))


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: TokenizerKind,
    vocab_size: int,
    out: Path,
    lowercase: bool = False,
    min_frequency: int = 2,
    model_max_length: int = 512,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Train a tokenizer and publish its folder, whole or not at all.

    `wordpiece` and `bpe` give the same bytes for the same texts. `unigram` gives the same pieces in practice, but its
    scores differ in the third digit between runs: the library's trainer walks a hash table with a random seed.

    Args:
        texts: the documents to learn from, read once.
        kind: wordpiece (BERT's normalizer and words), bpe (byte-level, loses nothing), unigram (SentencePiece).
        vocab_size: ids wanted, special tokens included; a small corpus may give fewer.
        out: the folder to write.
        lowercase: fold case (and, for wordpiece, strip accents).
        min_frequency: pieces seen less often are not learned.
        model_max_length: noted for users of the exported model, in tokens.
        overwrite: replace an existing folder.
        provenance: written to `training.json` in the folder.
        quiet: no progress bar.

    Raises:
        DataError: `out` exists, there is no text, or the vocabulary cannot even hold the alphabet.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already. Choose another --out, or replace it with --overwrite")
    with bar(total=None, description=f"training {kind} tokenizer", unit="char", quiet=quiet) as progress:
        trained = _TRAINERS[kind](
            _counted(texts, progress), vocab_size=vocab_size, lowercase=lowercase, min_frequency=min_frequency
        )
    _finish(trained)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        model_max_length=model_max_length,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS)),
    )
    make_directory(out.parent)
    staging = out.parent / f".staging-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        make_directory(staging)
        wrapped.save_pretrained(str(staging))
        if provenance is not None:
            write_json(staging / TRAINING_NAME, provenance)
        if out.exists():
            remove_directory(out)
        publish_directory(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = trained.get_vocab_size(with_added_tokens=True)
    if found < vocab_size:
        _LOG.info("the corpus gives a vocabulary of %d, fewer than the %d asked for", found, vocab_size)
    return out


def _counted(texts: Iterable[str], progress: Any) -> Iterator[str]:
    empty = True
    for text in texts:
        progress.update(len(text))
        if text:
            empty = False
            yield text
    if empty:
        raise DataError("no text to train a tokenizer on: the corpus is empty, or the sample of it is")


def _check_room(vocab_size: int, needed: int) -> None:
    if vocab_size < needed:
        raise DataError(
            f"vocab_size={vocab_size} cannot hold the special tokens and the alphabet: use at least {needed}"
        )


def _train_wordpiece(texts: Iterator[str], *, vocab_size: int, lowercase: bool, min_frequency: int) -> Any:
    tokenizer = Backend(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers `##x` pieces in the order of a randomly seeded hash table, and breaks ties by number. Naming
    # the alphabet and its `##x` forms first fixes both; it takes a first pass over the text, kept in a temporary file.
    with tempfile.TemporaryFile() as spill:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(tokenizer.normalizer.normalize_str(text))
            spill.write(json.dumps(text).encode() + b"\n")
        ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
        alphabet = sorted(ranked[:_ALPHABET_LIMIT])
        inner = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
        _check_room(vocab_size, len(SPECIAL_TOKENS) + len(alphabet) + len(inner))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[*SPECIAL_TOKENS, *inner],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        spill.seek(0)
        tokenizer.train_from_iterator((json.loads(line) for line in spill), trainer=trainer)
    # A fresh model, because the trainer made the `##x` pieces special.
    fresh = Backend(models.WordPiece(vocab=tokenizer.get_vocab(with_added_tokens=True), unk_token="[UNK]"))
    fresh.normalizer, fresh.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    fresh.decoder = decoders.WordPiece()
    fresh.add_special_tokens(list(SPECIAL_TOKENS))
    return fresh


def _train_bpe(texts: Iterator[str], *, vocab_size: int, lowercase: bool, min_frequency: int) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _check_room(vocab_size, len(SPECIAL_TOKENS) + len(alphabet))
    tokenizer = Backend(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()] + ([normalizers.Lowercase()] if lowercase else []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    _train(tokenizer, texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterator[str], *, vocab_size: int, lowercase: bool, min_frequency: int) -> Any:
    _check_room(vocab_size, len(SPECIAL_TOKENS) + 1)
    tokenizer = Backend(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()] + ([normalizers.Lowercase()] if lowercase else []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), unk_token="[UNK]", show_progress=False
    )
    _train(tokenizer, texts, trainer)
    # Special tokens leave the model's pieces: there they would match their own names in the text.
    pieces = [(p, s) for p, s in json.loads(tokenizer.to_str())["model"]["vocab"] if p not in SPECIAL_TOKENS]
    fresh = Backend(models.Unigram([("[UNK]", 0.0), *pieces], unk_id=0))
    fresh.normalizer, fresh.pre_tokenizer, fresh.decoder = (
        tokenizer.normalizer,
        tokenizer.pre_tokenizer,
        tokenizer.decoder,
    )
    fresh.add_special_tokens(list(SPECIAL_TOKENS))
    return fresh


_TRAINERS = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram}


def _train(tokenizer: Any, texts: Iterator[str], trainer: Any) -> None:
    # The first text is drawn here, so that an empty or unreadable corpus fails in Python with its own message.
    first = next(texts)
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer=trainer)


def _finish(tokenizer: Any) -> None:
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
