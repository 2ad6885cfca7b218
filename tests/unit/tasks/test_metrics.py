import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.tasks.metrics import baseline_metrics, classification_metrics, regression_metrics


def test_binary_f1_is_that_of_the_last_label():
    labels, predicted = np.array([1, 1, 0, 0, 0]), np.array([1, 0, 1, 0, 0])
    result = classification_metrics(labels, predicted, num_classes=2)
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["f1"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))  # precision 1/2, recall 1/2
    # TP 1, TN 2, FP 1, FN 1
    assert result["mcc"] == pytest.approx((1 * 2 - 1 * 1) / np.sqrt(2 * 2 * 3 * 3))


def test_f1_of_many_classes_averages_over_classes_absent_ones_included():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
    result = classification_metrics(labels, predicted, num_classes=3)
    assert result["f1"] == pytest.approx((0.8 + 2 / 3 + 0.0) / 3)


def test_one_class_everywhere_has_no_correlation():
    result = classification_metrics(np.zeros(3, dtype=int), np.zeros(3, dtype=int), num_classes=2)
    assert result == {"accuracy": 1.0, "f1": 0.0, "mcc": 0.0}


def test_spearman_sees_ranks_and_pearson_sees_values():
    result = regression_metrics(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 100.0]))
    assert result["spearman"] == pytest.approx(1.0)
    assert 0.8 < result["pearson"] < 0.95


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0]])
def test_a_constant_has_correlation_0_and_no_warning(values, recwarn):
    result = regression_metrics(np.array(values), np.arange(len(values)))
    assert (result["spearman"], result["pearson"]) == (0.0, 0.0)
    assert not recwarn.list


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.integers(2, 4))
def test_classification_metrics_stay_in_range_for_any_predictions(pairs, num_classes):
    labels, predicted = (np.array([p[i] % num_classes for p in pairs]) for i in (0, 1))
    result = classification_metrics(labels, predicted, num_classes=num_classes)
    assert 0 <= result["accuracy"] <= 1
    assert 0 <= result["f1"] <= 1
    assert -1 <= result["mcc"] <= 1


def test_the_baseline_says_the_commonest_training_label():
    train, labels = np.array([1, 1, 0]), np.array([0, 0, 0, 1])
    assert baseline_metrics(train, labels, num_classes=2)["accuracy"] == 0.25


def test_the_baseline_of_a_regression_says_the_training_mean():
    result = baseline_metrics(np.array([1.0, 3.0]), np.array([2.0, 4.0]), num_classes=None)
    assert result["rmse"] == pytest.approx(np.sqrt(2))
    assert result["spearman"] == 0.0
