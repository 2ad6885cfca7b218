"""What a fine-tuning task is, as settings: files, columns, what is predicted and how it is scored. Reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dstrain.base.config import Config

TaskKind = Literal["classification", "regression"]
MetricName = Literal["accuracy", "f1", "mcc", "spearman", "pearson"]

METRICS: dict[TaskKind, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "f1", "mcc"),
    "regression": ("spearman", "pearson"),
}
"""Metrics of each kind; the first one is the default. Larger is better for all of them."""


class TaskConfig(Config):
    """A task on single texts or pairs of texts, from csv, tsv, jsonl (each also .gz) or parquet files."""

    kind: TaskKind
    """classification predicts one of a few labels, regression one number."""
    train: Path
    """File with the examples to learn from."""
    validation: Path | None = None
    """File the best checkpoint is chosen by. None holds back a share of `train`."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of `train` held back when `validation` is not given. An example's side is decided by a hash of its text, so
    it depends neither on the order of the file nor on the seed, and equal texts stay on one side."""
    test: Path | None = None
    """File that is only scored and predicted at the end; it may come without labels."""
    text: str = Field(default="text", min_length=1)
    """Column of the (first) text."""
    text_pair: str | None = Field(default=None, min_length=1)
    """Column of the second text of a pair; None for single texts."""
    label: str = Field(default="label", min_length=1)
    """Column of the label or number."""
    labels: tuple[str, ...] | None = None
    """All labels in the order of the model's outputs. None takes the sorted labels of `train`. Of two labels the last
    one is the positive one for f1."""
    max_length: int = Field(default=128, ge=4)
    """Tokens of an example, special tokens included; the longer text of a pair is cut first. 128 holds most sentences
    and pairs; the model's number of positions is the upper limit."""
    metric: MetricName | None = None
    """What the best checkpoint is chosen by. None: accuracy for classification, spearman for regression."""

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_are_names(cls, value: Any) -> Any:
        # YAML reads `labels: [0, 1]` as numbers; as names they are what the files hold.
        if isinstance(value, (list, tuple)):
            return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
        return value

    @field_validator("labels")
    @classmethod
    def _labels_are_a_choice(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(value) < 2 or len(set(value)) < len(value)):
            raise ValueError(f"give at least two different labels, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _kind_fits(self) -> TaskConfig:
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            raise ValueError(f"task.metric: {self.metric} does not fit kind {self.kind}: use {_any_of(self.kind)}")
        if self.kind == "regression" and self.labels is not None:
            raise ValueError("task.labels: a regression predicts a number and has no labels; remove the key")
        if self.text_pair is not None and self.text_pair == self.text:
            raise ValueError(
                f"task.text_pair: the same column {self.text!r} as task.text; name the second text's column"
            )
        return self

    @property
    def chosen_metric(self) -> MetricName:
        """The metric that decides, default filled in."""
        return self.metric or METRICS[self.kind][0]


def _any_of(kind: TaskKind) -> str:
    return " or ".join(METRICS[kind])
