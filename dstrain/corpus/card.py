"""Count what a build saw, kept and dropped, and write the dataset card (`README.md`) and `stats.json` beside the shards.

`CardCounts` are plain sums: tasks count apart and are added in any order with the same result, byte for byte. Knows
nothing of how the build runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.config import dump_yaml
from dstrain.base.errors import DataError
from dstrain.base.storage import write_json, write_text
from dstrain.corpus.sources import Source

CARD_NAME = "README.md"
STATS_NAME = "stats.json"
_VERSION = 1
_SHOWN_SOURCES = 20
_BAR_WIDTH = 30
_INTEGERS = ("documents_read", "bytes_read", "characters", "text_bytes", "duplicates")
_TALLIES = ("dropped", "documents", "tokens", "source_documents", "source_bytes")
_HISTOGRAMS = ("token_lengths", "copies", "characters_per_token")


@dataclass
class CardCounts:
    """Sums over documents; `merge` adds another task's. Map tasks call `read` and `drop`, reduce tasks the others."""

    documents_read: int = 0
    """Documents that the readers gave."""
    bytes_read: int = 0
    """Their text in UTF-8 bytes."""
    characters: int = 0
    """Characters of kept documents."""
    text_bytes: int = 0
    """Text of kept documents in UTF-8 bytes."""
    duplicates: int = 0
    """Documents dropped (or, where duplicates are kept, found) as copies of another."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents dropped by reason: `empty`, `duplicate` and what filters say."""
    documents: Counter[str] = field(default_factory=Counter)
    """Kept documents of each split."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Kept tokens of each split."""
    source_documents: Counter[str] = field(default_factory=Counter)
    """Documents read from each source, by its short name."""
    source_bytes: Counter[str] = field(default_factory=Counter)
    """Text read from each source in UTF-8 bytes."""
    token_lengths: Counter[int] = field(default_factory=Counter)
    """Kept documents of 2**(k-1) to 2**k - 1 tokens, by k."""
    copies: Counter[int] = field(default_factory=Counter)
    """Texts that occur 2**k to 2**(k+1) - 1 times, k >= 1, and single ones under 0, by k."""
    characters_per_token: Counter[int] = field(default_factory=Counter)
    """Kept documents with k/2 to (k+1)/2 characters per token, by k; the last bin, 20, is open."""

    def read(self, source: Source, *, size_bytes: int) -> None:
        """Count a document that a reader gave, whatever becomes of it."""
        name = source_label(source)
        self.documents_read += 1
        self.bytes_read += size_bytes
        self.source_documents[name] += 1
        self.source_bytes[name] += size_bytes

    def drop(self, reason: str, *, count: int = 1) -> None:
        """Count documents dropped for a reason."""
        self.dropped[reason] += count

    def group(self, occurrences: int, *, dropped: bool = True) -> None:
        """Count one distinct text that occurs `occurrences` times; all but one are duplicates, dropped or kept."""
        self.copies[occurrences.bit_length() - 1] += 1
        self.duplicates += occurrences - 1
        if dropped and occurrences > 1:
            self.drop("duplicate", count=occurrences - 1)

    def keep(self, split: str, *, tokens: int, characters: int, size_bytes: int) -> None:
        """Count a document that went into a split: its tokens (>= 1), characters and UTF-8 bytes."""
        self.documents[split] += 1
        self.tokens[split] += tokens
        self.characters += characters
        self.text_bytes += size_bytes
        self.token_lengths[tokens.bit_length()] += 1
        self.characters_per_token[min(2 * characters // tokens, 20)] += 1

    def merge(self, other: CardCounts) -> None:
        """Add the sums of another task."""
        for name in _INTEGERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in (*_TALLIES, *_HISTOGRAMS):
            getattr(self, name).update(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads; equal counts give equal data, keys sorted."""
        data: dict[str, Any] = {"version": _VERSION} | {name: getattr(self, name) for name in _INTEGERS}
        for name in _TALLIES:
            data[name] = dict(sorted(getattr(self, name).items()))
        for name in _HISTOGRAMS:
            data[name] = {str(key): count for key, count in sorted(getattr(self, name).items())}
        return data

    @classmethod
    def from_json(cls, data: Any, *, place: str) -> CardCounts:
        """Read what `to_json` gave.

        Args:
            data: parsed JSON.
            place: where it was found, for the message.

        Raises:
            DataError: this is something else.
        """
        counts = cls()
        try:
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']!r}, not {_VERSION}")
            for name in _INTEGERS:
                setattr(counts, name, _count(data[name]))
            for name in _TALLIES:
                getattr(counts, name).update({str(key): _count(n) for key, n in data[name].items()})
            for name in _HISTOGRAMS:
                getattr(counts, name).update({int(key): _count(n) for key, n in data[name].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{place}: not the counts of a build task: {error!r}. Remove it and run again") from None
        return counts


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def source_label(source: Source) -> str:
    """A source's name without its folder, so that a card does not depend on where the corpus lies."""
    return Path(source.name).name if source.is_file else source.name


@dataclass(frozen=True)
class CardFacts:
    """What the card says beside the counts."""

    name: str
    """Title, e.g. the output folder's name."""
    tokenizer: Mapping[str, Any]
    """Facts of the tokenizer: vocab_size, dtype, fingerprint and what else is known."""
    settings: Mapping[str, Any]
    """Settings of the build, plain data."""
    splits: Mapping[str, Mapping[str, int]]
    """Each split's shards, blocks and bytes on disk."""


def write_card(folder: Path, counts: CardCounts, facts: CardFacts) -> None:
    """Write `README.md` and `stats.json` into a shards folder. Equal input gives equal bytes.

    Raises:
        StorageError: the disk is full or failing.
    """
    write_json(folder / STATS_NAME, stats(counts, facts))
    write_text(folder / CARD_NAME, card_text(counts, facts))


def stats(counts: CardCounts, facts: CardFacts) -> dict[str, Any]:
    """The content of `stats.json`: the counts, what follows from them, and the facts."""
    tokens = counts.tokens.total()
    return {
        "counts": counts.to_json(),
        "totals": {
            "documents": counts.documents.total(),
            "tokens": tokens,
            "characters_per_token": round(counts.characters / tokens, 4) if tokens else None,
            "bytes_per_token": round(counts.text_bytes / tokens, 4) if tokens else None,
            "dropped": counts.dropped.total(),
        },
        "tokenizer": dict(facts.tokenizer),
        "settings": dict(facts.settings),
        "splits": {name: dict(split) for name, split in facts.splits.items()},
    }


def card_text(counts: CardCounts, facts: CardFacts) -> str:
    """The dataset card: YAML front matter as the Hugging Face hub reads it, then tables for people."""
    documents, tokens = counts.documents.total(), counts.tokens.total()
    front = {
        "pretty_name": facts.name,
        "task_categories": ["fill-mask"],
        "size_categories": [size_category(documents)],
        "tags": ["dstrain", "webdataset", "tokenized", "pretraining"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}/*.tar"} for name in sorted(facts.splits)],
            }
        ],
    }
    parts = [
        f"---\n{dump_yaml(front)}---",
        f"# {_escaped(facts.name)}",
        f"{documents:,} documents, {tokens:,} tokens, tokenised and shuffled as WebDataset shards by dstrain. "
        "Licence and origin of the texts are those of the sources below: add them here before you share this folder.",
        _split_section(counts, facts),
        _text_section(counts),
        _dropped_section(counts),
        "## Document lengths\n\n" + _histogram(counts.token_lengths, "tokens", _length_label),
        "## Characters per token\n\n" + _histogram(counts.characters_per_token, "characters", _ratio_label),
        "## Duplicates\n\n" + _duplicates(counts) + _histogram(counts.copies, "times a text occurs", _copies_label),
        _source_section(counts),
        "## Tokenizer\n\n" + _table(("fact", "value"), [(str(k), _shown(v)) for k, v in facts.tokenizer.items()]),
        "## Settings\n\n```yaml\n" + dump_yaml(facts.settings) + "```",
        "Read it with dstrain (`data.path: FOLDER`), with any WebDataset reader, or with "
        "`datasets.load_dataset(FOLDER)`; a sample is a block of whole documents: `tokens.npy` holds ids, `ends.npy` "
        f"where each document ends. All numbers are in `{STATS_NAME}`.",
    ]
    return "\n\n".join(parts) + "\n"


def size_category(documents: int) -> str:
    """The hub's name for a dataset's size, e.g. `10K<n<100K`."""
    if documents < 1000:
        return "n<1K"
    marks = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = len(str(documents)) - 4
    return f"{marks[place]}<n<{marks[place + 1]}" if place + 1 < len(marks) else "n>1T"


def _split_section(counts: CardCounts, facts: CardFacts) -> str:
    rows = []
    for name, split in sorted(facts.splits.items()):
        stored = (f"{split.get(key, 0):,}" for key in ("blocks", "shards", "bytes"))
        rows.append((name, f"{counts.documents[name]:,}", f"{counts.tokens[name]:,}", *stored))
    return "## Splits\n\n" + _table(("split", "documents", "tokens", "blocks", "shards", "bytes on disk"), rows)


def _text_section(counts: CardCounts) -> str:
    tokens = max(counts.tokens.total(), 1)
    rows = [
        ("documents read", f"{counts.documents_read:,}"),
        ("text read", f"{counts.bytes_read:,} bytes"),
        ("text kept", f"{counts.text_bytes:,} bytes"),
        ("characters per token", f"{counts.characters / tokens:.2f}"),
        ("bytes per token", f"{counts.text_bytes / tokens:.2f}"),
        ("duplicates found", f"{counts.duplicates:,}"),
    ]
    return "## Text\n\n" + _table(("what", "amount"), rows)


def _dropped_section(counts: CardCounts) -> str:
    if not counts.dropped:
        return "## Dropped\n\nNothing was dropped."
    read = max(counts.documents_read, 1)
    ranked = sorted(counts.dropped.items(), key=lambda entry: (-entry[1], entry[0]))
    rows = [(reason, f"{count:,}", f"{count / read:.2%}") for reason, count in ranked]
    return "## Dropped\n\n" + _table(("reason", "documents", "of those read"), rows)


def _source_section(counts: CardCounts) -> str:
    ranked = sorted(counts.source_bytes.items(), key=lambda entry: (-entry[1], entry[0]))
    rows = [
        (name, f"{counts.source_documents[name]:,}", f"{size:,}", f"{size / max(counts.bytes_read, 1):.1%}")
        for name, size in ranked[:_SHOWN_SOURCES]
    ]
    left = len(ranked) - len(rows)
    more = f"\n\nand {left:,} more, in `{STATS_NAME}`" if left else ""
    return "## Sources\n\n" + _table(("source", "documents", "bytes of text", "share"), rows) + more


def _histogram(counts: Mapping[int, int], unit: str, label: Any) -> str:
    most = max(counts.values(), default=1)
    bins = range(min(counts, default=0), max(counts, default=-1) + 1)
    rows = [(label(k), f"{counts.get(k, 0):,}", "█" * round(_BAR_WIDTH * counts.get(k, 0) / most)) for k in bins]
    return _table((unit, "count", ""), rows)


def _duplicates(counts: CardCounts) -> str:
    dropped = counts.dropped["duplicate"]
    fate = f"{dropped:,} of them dropped" if dropped else "none dropped"
    return f"{counts.copies.total():,} distinct texts and {counts.duplicates:,} copies of them, {fate}. How often a text occurs:\n\n"


def _length_label(k: int) -> str:
    return "1" if k == 1 else f"{1 << k - 1:,}–{(1 << k) - 1:,}"


def _copies_label(k: int) -> str:
    return "1" if k == 0 else f"{1 << k:,}–{(2 << k) - 1:,}"


def _ratio_label(k: int) -> str:
    return "10 or more" if k == 20 else f"{k / 2:.1f}–{(k + 1) / 2:.1f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(map(_escaped, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: str) -> str:
    # Names of files and fields are data: they must not break a table or become HTML.
    for mark, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`")):
        text = text.replace(mark, safe)
    return " ".join(text.split())


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)
