"""The page of hyper-parameters, through TensorBoard's own server code: the table that a browser is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context
from tensorboard.plugins.hparams.list_session_groups import Handler

from dstrain.base.world import World
from dstrain.monitor.hparams import FIGURES, Setting
from dstrain.monitor.tensorboard import TensorBoard

SECRET = "hf_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7"


def settings(rate: float, *, task: int | None = None) -> list[Setting]:
    return [
        Setting("optimizer.learning_rate", rate, is_number=True),
        Setting("task.max_length", task, is_number=True),
        Setting("stage", "pretrain", is_number=False, comes_first=True),
        Setting("model.init_from", f"https://user:{SECRET}@host/model", is_number=False),
    ]


def write(
    folder: Path,
    *,
    rate: float,
    start_step: int = 0,
    figures: dict[str, float],
    complete: bool,
    task: int | None = None,
) -> None:
    board = TensorBoard(folder, World(), start_step=start_step, settings=settings(rate, task=task))
    board.scalars(start_step + 10, {"train/loss": 1.0, **figures})
    if complete:
        board.completed()
    board.close()


def page(logdir: Path) -> tuple[Any, list[Any]]:
    """The table's description and its rows."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = RequestContext()
    contents = context.hparams_metadata(request, experiment_id="")
    experiment = context.experiment_from_metadata(
        request, "", True, contents, context.hparams_from_data_provider(request, "", 1000)
    )
    columns = [api_pb2.ColParams(metric=info.name, order=api_pb2.ORDER_UNSPECIFIED) for info in experiment.metric_infos]
    every = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_FAILURE, api_pb2.STATUS_UNKNOWN]
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=every, col_params=columns, start_index=0, slice_size=100, include_metrics=True
    )
    answer = Handler(request, context, "", asked).run()
    return experiment, list(answer.session_groups)


def figures_of(row: Any) -> dict[str, float]:
    return {value.name.tag: value.value for value in row.metric_values}


def test_every_run_is_a_row_with_its_settings_and_its_figures(tmp_path: Path) -> None:
    write(
        tmp_path / "a", rate=1e-3, figures={"hparam/held_out_loss": 2.0, "hparam/tokens_per_second": 5.0}, complete=True
    )
    write(tmp_path / "b", rate=2e-3, figures={"hparam/held_out_loss": 3.0}, complete=False, task=64)
    experiment, rows = page(tmp_path)
    assert {info.name for info in experiment.hparam_infos} == {s.name for s in settings(0.0)}
    assert experiment.hparam_infos[0].name == "stage"
    assert [info.name.tag for info in experiment.metric_infos] == list(FIGURES)
    found = {row.name or row.sessions[0].name: row for row in rows}
    by_rate = {row.hparams["optimizer.learning_rate"].number_value: row for row in found.values()}
    assert figures_of(by_rate[1e-3]) == {"hparam/held_out_loss": 2.0, "hparam/tokens_per_second": 5.0}
    assert figures_of(by_rate[2e-3]) == {"hparam/held_out_loss": 3.0}
    assert by_rate[1e-3].hparams["stage"].string_value == "pretrain"
    assert "task.max_length" not in by_rate[1e-3].hparams
    assert by_rate[2e-3].hparams["task.max_length"].number_value == 64
    assert [row.sessions[0].status for row in (by_rate[1e-3], by_rate[2e-3])] == [
        api_pb2.STATUS_SUCCESS,
        api_pb2.STATUS_UNKNOWN,
    ]


def test_a_run_that_went_on_is_one_row_with_the_last_figures(tmp_path: Path) -> None:
    write(tmp_path / "a", rate=1e-3, figures={"hparam/held_out_loss": 2.0}, complete=False)
    write(tmp_path / "a", rate=1e-3, start_step=10, figures={"hparam/held_out_loss": 1.5}, complete=True)
    _, rows = page(tmp_path)
    assert [figures_of(row) for row in rows] == [{"hparam/held_out_loss": 1.5}]
    assert rows[0].sessions[0].status == api_pb2.STATUS_SUCCESS


def test_no_secret_is_on_the_page(tmp_path: Path) -> None:
    write(tmp_path / "a", rate=1e-3, figures={}, complete=True)
    (event_file,) = (tmp_path / "a").iterdir()
    assert SECRET.encode() not in event_file.read_bytes()
    assert b"model.init_from" in event_file.read_bytes()
