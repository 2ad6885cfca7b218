"""How good predictions are. Pure functions of labels and predictions; scikit-learn and scipy do the arithmetic.

All metrics: larger is better. A constant prediction ranks nothing: its correlation is 0 here, not nan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics as sk

Labels = npt.NDArray[Any]


def classification_metrics(labels: Labels, predicted: Labels, *, num_classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation.

    Args:
        labels: (N,) true classes.
        predicted: (N,) predicted classes.
        num_classes: 2 scores F1 of the last class; more average it over classes (macro), absent ones counting 0.
    """
    average = "binary" if num_classes == 2 else "macro"
    f1 = sk.f1_score(labels, predicted, average=average, pos_label=1, labels=np.arange(num_classes), zero_division=0.0)
    constant = np.ptp(labels) == 0 or np.ptp(predicted) == 0
    return {
        "accuracy": float(np.mean(labels == predicted)),
        "f1": float(f1),
        "mcc": 0.0 if constant else float(sk.matthews_corrcoef(labels, predicted)),
    }


def regression_metrics(labels: Labels, predicted: Labels) -> dict[str, float]:
    """Spearman and Pearson correlation of (N,) numbers, and the root of the mean squared error (smaller is better)."""
    labels, predicted = labels.astype(np.float64), predicted.astype(np.float64)
    constant = len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0
    return {
        "spearman": 0.0 if constant else float(stats.spearmanr(labels, predicted).statistic),
        "pearson": 0.0 if constant else float(stats.pearsonr(labels, predicted).statistic),
        "rmse": float(np.sqrt(np.mean(np.square(labels - predicted)))),
    }


def baseline_metrics(train_labels: Labels, labels: Labels, *, num_classes: int | None) -> dict[str, float]:
    """What a model without input reaches: the commonest training label, or the training mean.

    Args:
        train_labels: (M,) labels of the training examples.
        labels: (N,) labels to be scored against.
        num_classes: classes of a classification, None for a regression.
    """
    if num_classes is None:
        mean = float(train_labels.astype(np.float64).mean())
        return regression_metrics(labels, np.full(len(labels), mean))
    commonest = int(np.bincount(train_labels, minlength=num_classes).argmax())
    return classification_metrics(labels, np.full(len(labels), commonest), num_classes=num_classes)
