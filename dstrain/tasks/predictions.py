"""Predictions of a whole split: put together from the ranks' parts, and written as jsonl. Runs no model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from dstrain.base.storage import make_directory, write_text
from dstrain.tasks.examples import Examples
from dstrain.tasks.loader import FILLER
from dstrain.tasks.metrics import classification_metrics, regression_metrics

Outputs = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


def assemble(parts: Iterable[tuple[Int64, Outputs]], *, num_examples: int) -> Outputs:
    """Put the outputs of all ranks' micro-batches into the order of the examples.

    Args:
        parts: (n,) example indices with FILLER where a segment is none, and their (n, C) outputs.
        num_examples: N.

    Returns:
        (N, C) float32 outputs.

    Raises:
        AssertionError: an example is missing or stands twice, which is a defect.
    """
    indices, outputs = zip(*[(np.asarray(i), np.asarray(o, dtype=np.float32)) for i, o in parts])
    index, output = np.concatenate(indices), np.concatenate(outputs)
    real = index != FILLER
    assert np.array_equal(np.sort(index[real]), np.arange(num_examples)), "evaluation lost or repeated examples"
    result = np.empty((num_examples, output.shape[1]), dtype=np.float32)
    result[index[real]] = output[real]
    return result


def score(outputs: Outputs, examples: Examples, *, labels: tuple[str, ...] | None) -> dict[str, float]:
    """Metrics of a split: larger is better, but for `loss` (mean cross-entropy) and `rmse`.

    Args:
        outputs: (N, C) logits, or (N, 1) predicted numbers.
        examples: the N examples, with labels.
        labels: names of the classes, None for a regression.
    """
    if labels is None:
        return regression_metrics(examples.labels, outputs[:, 0])
    metrics = classification_metrics(examples.labels, outputs.argmax(axis=1), num_classes=len(labels))
    chances = softmax(outputs.astype(np.float64), axis=1)[np.arange(len(examples)), examples.labels]
    return {"loss": float(-np.log(np.maximum(chances, np.finfo(np.float64).tiny)).mean()), **metrics}


def write_predictions(
    path: Path, outputs: Outputs, examples: Examples, *, labels: tuple[str, ...] | None, with_text: bool = True
) -> None:
    """Write one JSON object a line, in the order of the examples.

    `index` counts examples from 0, `row` is the line or row in the task's file, `label` is left out where the file has
    none, `scores` are probabilities by label (classification only).

    Args:
        path: the jsonl file; its folder is made.
        outputs: (N, C) logits, or (N, 1) predicted numbers.
        examples: the N examples.
        labels: names of the classes, None for a regression.
        with_text: repeat the texts, so that the file can be read by itself.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = []
    scores = None if labels is None else softmax(outputs.astype(np.float64), axis=1)
    for index in range(len(examples)):
        line: dict[str, Any] = {"index": index, "row": examples.rows[index]}
        if with_text:
            line["text"] = examples.texts[index]
            if examples.pairs is not None:
                line["text_pair"] = examples.pairs[index]
        if labels is None or scores is None:
            if examples.has_labels:
                line["label"] = float(examples.labels[index])
            line["predicted"] = float(outputs[index, 0])
        else:
            if examples.has_labels:
                line["label"] = labels[examples.labels[index]]
            line["predicted"] = labels[int(outputs[index].argmax())]
            line["scores"] = {name: round(float(s), 6) for name, s in zip(labels, scores[index])}
        lines.append(json.dumps(line, ensure_ascii=False))
    make_directory(path.parent)
    write_text(path, "\n".join(lines) + "\n")
