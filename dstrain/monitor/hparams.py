"""TensorBoard's page of hyper-parameters: a run's settings as columns, and the figures that runs are compared by.

The columns are the same for every run, whatever it is: TensorBoard takes the description of the table from whichever run it reads
first. A figure is an ordinary curve whose last point counts. Builds records; who writes them is `tensorboard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName, Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from dstrain.base.secrets import redact

HELD_OUT = ("loss", "accuracy", "f1", "mcc", "spearman", "pearson")
"""Metrics of evaluations that are figures; a run has some of them."""

FIGURES = (
    *(f"hparam/held_out_{name}" for name in HELD_OUT[:2]),
    *(f"hparam/{name}" for name in ("tokens_per_second", "mfu", "cost_usd", "goodput")),
    *(f"hparam/held_out_{name}" for name in HELD_OUT[2:]),
)
"""Curves that are columns of the table, the first few of them shown unasked; what is not held out is written when a process
ends well."""


@dataclass(frozen=True)
class Setting:
    """One column, with this run's value."""

    name: str
    """As in the configuration, e.g. "optimizer.learning_rate"."""
    value: float | str | None
    """None where this kind of run has no such setting."""
    is_number: bool
    """What the column holds: numbers, or texts."""
    comes_first: bool = False
    """TensorBoard sorts columns by name and shows a few; these come before the others."""


def table_of(settings: Sequence[Setting], *, started_at: float) -> list[Summary]:
    """The records of a beginning: what the table looks like, and this run's row.

    Args:
        settings: every column, in order.
        started_at: Unix seconds.
    """
    columns = [
        HParamInfo(
            name=s.name,
            type=DataType.DATA_TYPE_FLOAT64 if s.is_number else DataType.DATA_TYPE_STRING,
            differs=s.comes_first,  # what "is not the same in all runs" is sorted before the rest
        )
        for s in settings
    ]
    figures = [MetricInfo(name=MetricName(tag=tag), display_name=tag.removeprefix("hparam/")) for tag in FIGURES]
    row = SessionStartInfo(start_time_secs=started_at)
    for setting in settings:
        if setting.value is not None and setting.is_number:
            row.hparams[setting.name].number_value = float(setting.value)
        elif setting.value is not None:
            row.hparams[setting.name].string_value = redact(str(setting.value))
    return [
        _record(metadata.EXPERIMENT_TAG, experiment=Experiment(hparam_infos=columns, metric_infos=figures)),
        _record(metadata.SESSION_START_INFO_TAG, session_start_info=row),
    ]


def completed(*, ended_at: float) -> Summary:
    """The record of a run that is complete; `ended_at` in Unix seconds."""
    end = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=ended_at)
    return _record(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _record(tag: str, **content: Experiment | SessionStartInfo | SessionEndInfo) -> Summary:
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data)
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])
