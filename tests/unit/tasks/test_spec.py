from pathlib import Path

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.tasks.spec import METRICS, TaskConfig


def task(**changes):
    return validate(TaskConfig, {"kind": "classification", "train": "a.csv", **changes}, source="task")


def test_a_task_needs_a_kind_and_a_file_only():
    config = task()
    assert config.train == Path("a.csv")
    assert (config.text, config.label, config.text_pair, config.max_length) == ("text", "label", None, 128)


@pytest.mark.parametrize(("kind", "metric"), [("classification", "accuracy"), ("regression", "spearman")])
def test_each_kind_has_its_metric(kind, metric):
    assert task(kind=kind).chosen_metric == metric == METRICS[kind][0]


def test_a_metric_of_the_other_kind_is_refused_with_the_ones_that_fit():
    with pytest.raises(ConfigError, match=r"pearson does not fit kind classification.*accuracy or f1 or mcc"):
        task(metric="pearson")


def test_labels_written_as_numbers_are_names():
    assert task(labels=[0, 1]).labels == ("0", "1")


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], [], [True, False]])
def test_labels_that_are_no_choice_are_refused(labels):
    with pytest.raises(ConfigError, match="labels"):
        task(labels=labels)


def test_a_regression_has_no_labels():
    with pytest.raises(ConfigError, match=r"task\.labels"):
        task(kind="regression", labels=["a", "b"])


def test_a_text_cannot_be_its_own_pair():
    with pytest.raises(ConfigError, match="text_pair"):
        task(text="sentence", text_pair="sentence")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_validation_share_outside_0_and_1_is_refused(fraction):
    with pytest.raises(ConfigError, match="validation_fraction"):
        task(validation_fraction=fraction)
