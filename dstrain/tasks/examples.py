"""Task files as examples: texts, pairs, labels. Knows no tokens and no order of training.

Every fault of a file is one `DataError` naming the file, the row, the column and what is there instead.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError
from dstrain.base.protocols import IGNORED_LABEL
from dstrain.corpus.documents import read_rows
from dstrain.corpus.sources import separator_advice
from dstrain.tasks.spec import TaskConfig

_MOST_LABELS = 1000  # more different labels than this are numbers or texts, not classes
_SHOWN_LABELS = 12


@dataclass(frozen=True)
class Examples:
    """N examples of one split."""

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    """Second texts, or None for a task on single texts."""
    labels: npt.NDArray[Any]
    """(N,) int64 classes or float32 numbers; all IGNORED_LABEL when the file has no labels."""
    rows: tuple[int, ...]
    """Where each example stands in its file: line or row number, from 1."""
    has_labels: bool = True

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at some indices, in that order."""
        chosen = list(indices)
        return Examples(
            texts=tuple(self.texts[i] for i in chosen),
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in chosen),
            labels=self.labels[chosen],
            rows=tuple(self.rows[i] for i in chosen),
            has_labels=self.has_labels,
        )


@dataclass(frozen=True)
class TaskData:
    """The splits of a task."""

    train: Examples
    validation: Examples
    test: Examples | None
    labels: tuple[str, ...] | None
    """Names of the classes in output order; None for a regression."""

    @property
    def num_outputs(self) -> int:
        """Outputs the model's head needs: the classes, or 1."""
        return 1 if self.labels is None else len(self.labels)


@dataclass(frozen=True)
class _Raw:
    """A file's columns before labels are turned into numbers."""

    path: Path
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None
    rows: list[int]


def read_task(config: TaskConfig) -> TaskData:
    """Read all files of a task.

    Raises:
        DataError: a file, row, column or label is wrong; the message names it and the fix.
    """
    raw = _read(config.train, config)
    labels = None
    if config.kind == "classification":
        labels = config.labels or _labels_of(raw, config)
    train = _finish(raw, config, labels)
    if config.validation is not None:
        validation = _finish(_read(config.validation, config), config, labels)
    else:
        train, validation = split_by_hash(train, fraction=config.validation_fraction, source=config.train)
    test = None
    if config.test is not None:
        test = _finish(_read(config.test, config, label_is_optional=True), config, labels)
    return TaskData(train=train, validation=validation, test=test, labels=labels)


def split_by_hash(examples: Examples, *, fraction: float, source: Path) -> tuple[Examples, Examples]:
    """Hold back about `fraction` of the examples, each by a hash of its text alone.

    Args:
        examples: what is split.
        fraction: share of the second part.
        source: the file, for messages.

    Raises:
        DataError: one of the parts would be empty.
    """
    pairs = examples.pairs or ("",) * len(examples)
    held = [_unit_hash(text, pair) < fraction for text, pair in zip(examples.texts, pairs)]
    kept = examples.take([i for i, h in enumerate(held) if not h])
    back = examples.take([i for i, h in enumerate(held) if h])
    if not len(kept) or not len(back):
        raise DataError(
            f"{source}: its {len(examples)} examples cannot be split with task.validation_fraction={fraction}: "
            f"{len(kept)} would be left to learn from and {len(back)} to validate on; name a task.validation file"
        )
    return kept, back


def _unit_hash(text: str, pair: str) -> float:
    digest = hashlib.blake2b(
        f"{len(text)}:{text}{pair}".encode("utf-8", "surrogatepass"), digest_size=8, person=b"split"
    )
    return int.from_bytes(digest.digest(), "little") / 2**64


def _read(path: Path, config: TaskConfig, *, label_is_optional: bool = False) -> _Raw:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give one of its files")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise DataError(f"{path}: no such task file.{hint}")
    raw = _Raw(path=path, texts=[], pairs=[] if config.text_pair else None, labels=[], rows=[])
    labels: list[Any] | None = raw.labels
    for number, row in read_rows(path):
        if label_is_optional and not raw.rows and config.label not in row:
            labels = None
        raw.rows.append(number)
        raw.texts.append(_text(row, config.text, path=path, number=number))
        if raw.pairs is not None and config.text_pair is not None:
            raw.pairs.append(_text(row, config.text_pair, path=path, number=number))
        if labels is not None:
            labels.append(_cell(row, config.label, path=path, number=number))
    if not raw.rows:
        raise DataError(f"{path}: no examples in this file")
    return _Raw(path=path, texts=raw.texts, pairs=raw.pairs, labels=labels, rows=raw.rows)


def _cell(row: Mapping[str, Any], column: str, *, path: Path, number: int) -> Any:
    if column not in row:
        near = difflib.get_close_matches(column, list(row), n=1)
        hint = separator_advice(list(row)) or (f" Did you mean {near[0]!r}?" if near else "")
        raise DataError(f"{path}: row {number} has no column {column!r}; it has {', '.join(map(repr, row))}.{hint}")
    value = row[column]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{path}: row {number}: column {column!r} is empty; fill it or remove the row")
    return value


def _text(row: Mapping[str, Any], column: str, *, path: Path, number: int) -> str:
    value = _cell(row, column, path=path, number=number)
    if not isinstance(value, str):
        raise DataError(f"{path}: row {number}: column {column!r} is not text but {type(value).__name__} ({value!r})")
    return value


def _labels_of(raw: _Raw, config: TaskConfig) -> tuple[str, ...]:
    found = {_label_name(value) for value in raw.labels or []}
    if len(found) < 2:
        raise DataError(f"{raw.path}: every example has the label {found.pop()!r}; a classification needs two or more")
    if len(found) > _MOST_LABELS:
        raise DataError(
            f"{raw.path}: column {config.label!r} has {len(found)} different labels: for numbers use "
            "task.kind=regression, or list them in task.labels"
        )
    if all(name.lstrip("-").isdecimal() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _label_name(value: Any) -> str:
    """One spelling for a label however its file stores it: "pos", 1, 1.0 (a column with gaps in pandas) and true."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _finish(raw: _Raw, config: TaskConfig, labels: tuple[str, ...] | None) -> Examples:
    if raw.labels is None:
        numbers: npt.NDArray[Any] = np.full(
            len(raw.rows), IGNORED_LABEL, dtype=np.float32 if labels is None else np.int64
        )
    elif labels is None:
        values = [_number(v, config, raw.path, n) for v, n in zip(raw.labels, raw.rows)]
        numbers = np.array(values, dtype=np.float32)
    else:
        classes = {name: index for index, name in enumerate(labels)}
        indices = [_class(v, classes, config, raw.path, n) for v, n in zip(raw.labels, raw.rows)]
        numbers = np.array(indices, dtype=np.int64)
    return Examples(
        texts=tuple(raw.texts),
        pairs=None if raw.pairs is None else tuple(raw.pairs),
        labels=numbers,
        rows=tuple(raw.rows),
        has_labels=raw.labels is not None,
    )


def _class(value: Any, classes: Mapping[str, int], config: TaskConfig, path: Path, number: int) -> int:
    index = classes.get(_label_name(value))
    if index is None:
        names = list(classes)
        shown = ", ".join(map(repr, names[:_SHOWN_LABELS])) + (", ..." if len(names) > _SHOWN_LABELS else "")
        origin = "task.labels" if config.labels else f"{config.train}"
        raise DataError(
            f"{path}: row {number}: column {config.label!r} has the label {_label_name(value)!r}, which is not among "
            f"those of {origin}: {shown}"
        )
    return index


def _number(value: Any, config: TaskConfig, path: Path, number: int) -> float:
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result) or isinstance(value, bool):
        raise DataError(
            f"{path}: row {number}: column {config.label!r} is {value!r}, not a finite number, which "
            "task.kind=regression needs; for classes use task.kind=classification"
        )
    return result
