import json

import numpy as np
import pytest

from dstrain.base.errors import StorageError
from dstrain.base.protocols import IGNORED_LABEL
from dstrain.tasks.examples import Examples
from dstrain.tasks.loader import FILLER
from dstrain.tasks.predictions import assemble, score, write_predictions


def examples(labels, *, pairs=None, has_labels=True):
    n = len(labels)
    return Examples(
        texts=tuple(f"text {i} é" for i in range(n)),
        pairs=pairs,
        labels=np.array(labels),
        rows=tuple(range(2, n + 2)),
        has_labels=has_labels,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_parts_of_ranks_come_into_the_order_of_the_examples_without_filler():
    parts = [
        (np.array([2, 0]), np.array([[2.0], [0.0]])),
        (np.array([FILLER]), np.array([[99.0]])),
        (np.array([1]), np.array([[1.0]])),
    ]
    assert assemble(parts, num_examples=3).tolist() == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 1], [0, 1, 2, 2]])
def test_lost_or_repeated_examples_are_a_defect(indices):
    with pytest.raises(AssertionError):
        assemble([(np.array(indices), np.zeros((len(indices), 1)))], num_examples=3)


def test_a_classification_is_written_with_names_and_probabilities(tmp_path):
    path = tmp_path / "predictions" / "test.jsonl"
    outputs = np.array([[0.0, 0.0], [np.log(3.0), 0.0]])
    write_predictions(path, outputs, examples([1, 0]), labels=("neg", "pos"))
    first, second = lines(path)
    assert first["text"] == "text 0 é"
    assert (first["index"], first["row"], first["label"]) == (0, 2, "pos")
    assert second["predicted"] == "neg"
    assert second["scores"] == pytest.approx({"neg": 0.75, "pos": 0.25})


def test_a_regression_is_written_as_numbers(tmp_path):
    write_predictions(tmp_path / "p.jsonl", np.array([[1.5]]), examples([2.0], pairs=("other",)), labels=None)
    [line] = lines(tmp_path / "p.jsonl")
    assert line == {"index": 0, "row": 2, "text": "text 0 é", "text_pair": "other", "label": 2.0, "predicted": 1.5}


def test_examples_without_labels_have_none_in_the_file(tmp_path):
    unlabelled = examples([IGNORED_LABEL], has_labels=False)
    write_predictions(tmp_path / "p.jsonl", np.array([[0.0, 1.0]]), unlabelled, labels=("a", "b"), with_text=False)
    assert set(lines(tmp_path / "p.jsonl")[0]) == {"index", "row", "predicted", "scores"}


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write_predictions(tmp_path / "file" / "p.jsonl", np.array([[0.0, 1.0]]), examples([0]), labels=("a", "b"))


def test_scores_of_a_classification_have_loss_and_metrics():
    result = score(np.array([[0.0, 0.0], [0.0, 0.0]]), examples([0, 1]), labels=("a", "b"))
    assert result["loss"] == pytest.approx(np.log(2))
    assert result["accuracy"] == 0.5
    assert set(result) == {"loss", "accuracy", "f1", "mcc"}


def test_scores_of_a_regression_are_correlations():
    assert score(np.array([[1.0], [2.0]]), examples([10.0, 20.0]), labels=None)["spearman"] == pytest.approx(1.0)
