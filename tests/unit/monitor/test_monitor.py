import re

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from dstrain.base.protocols import RunState, StepReport
from dstrain.base.world import World
from dstrain.health.stragglers import balance
from dstrain.monitor.config import MonitorConfig
from dstrain.monitor.events import current_curve, read_events
from dstrain.monitor.flops import ModelShape, Passage, flops_per_token
from dstrain.monitor.goodput import BUCKETS
from dstrain.monitor.histogram import EMPTY, histogram_of
from dstrain.monitor.monitor import Monitor, ledger_curves
from dstrain.monitor.tensorboard import LAYOUT

# TensorBoard's writing thread dies with a traceback when its folder goes away; pytest may notice in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

SHAPE = ModelShape(layers=2, hidden=64, intermediate=256, vocab=1000)


def monitor(
    folder,
    *,
    world=None,
    max_steps=25,
    start_step=0,
    shape=None,
    device_name="cpu",
    passage=lambda _: Passage(),
    **config,
):
    return Monitor(
        MonitorConfig(**{"log_every": 10, "tensorboard": False, **config}),
        run_folder=folder,
        world=world or World(),
        max_steps=max_steps,
        start_step=start_step,
        shape=shape,
        device_name=device_name,
        passage=passage,
        num_devices=2,
        config_text="seed: 1",
    )


def report(step, *, tokens=900, applied=True, loss=3.0):
    return StepReport(
        step=step,
        loss=loss,
        accuracy=0.25,
        gradient_norm=1.5 if applied else float("inf"),
        learning_rate=1e-4,
        applied=applied,
        num_tokens=tokens,
        num_targets=135,
        num_rows=8,
        padded_tokens=1000,
        ledger=2**62 + step,
        epoch=step / 100,
        seconds={"data": 0.1, "forward_backward": 0.7, "step": 0.1, "other": 0.1, "total": 1.0},
    )


def run(observer, steps, **changes):
    state = RunState()
    for step in steps:
        state.step = step
        state.tokens = 900 * step
        state.rows = 8 * step
        state.ledger = 2**62 + 3 * step
        state.compute_seconds = 1.0 * step
        observer.on_step(state, report(step, **changes))
    observer.on_end(state)
    return state


def events(folder, name):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == name]


def test_points_stand_at_step_1_every_log_every_and_the_last(tmp_path):
    run(monitor(tmp_path), range(1, 26))
    assert [e["step"] for e in events(tmp_path, "step")] == [1, 10, 20, 25]


def test_a_step_event_carries_what_tools_need(tmp_path):
    run(monitor(tmp_path), range(1, 11))
    event = events(tmp_path, "step")[-1]
    assert event["loss"] == 3.0
    assert event["accuracy"] == 0.25
    assert event["learning_rate"] == 1e-4
    assert event["gradient_norm"] == 1.5
    assert event["tokens_per_second"] == pytest.approx(900)
    assert event["padding_percent"] == pytest.approx(10)
    assert event["seconds"] == pytest.approx(
        {"data": 0.1, "forward_backward": 0.7, "step": 0.1, "save": 0, "evaluate": 0, "other": 0.1, "total": 1.0}
    )
    assert (event["tokens"], event["rows"], event["epoch"]) == (9000, 80, 0.1)
    assert event["ledger"] == str(2**62 + 30)
    assert event["step_ledger"] == str(2**62 + 10)
    assert event["applied"] is True
    assert event["window_steps"] == 9
    assert "mfu" not in event
    assert "cost_usd" not in event


def test_speed_is_taken_over_all_steps_since_the_last_point(tmp_path):
    observer, state = monitor(tmp_path, log_every=2), RunState()
    for step, tokens in enumerate([900, 100, 300, 500], start=1):
        observer.on_step(state, report(step, tokens=tokens))
    assert [e["tokens_per_second"] for e in events(tmp_path, "step")] == pytest.approx([900, 100, 400])


def test_every_skipped_step_is_an_event_of_its_own(tmp_path):
    run(monitor(tmp_path), range(2, 5), applied=False, loss=float("nan"))
    skipped = events(tmp_path, "step_skipped")
    assert [e["step"] for e in skipped] == [2, 3, 4]
    assert skipped[0]["gradient_norm"] == "inf"
    assert skipped[0]["loss"] == "nan"


def test_utilisation_needs_a_shape_and_a_known_peak(tmp_path):
    for folder, shape, device in [("a", SHAPE, "NVIDIA H200"), ("b", SHAPE, "cpu"), ("c", None, "NVIDIA H200")]:
        run(monitor(tmp_path / folder, shape=shape, device_name=device), [1])
    assert events(tmp_path / "a", "step")[0]["mfu"] > 0
    assert "mfu" not in events(tmp_path / "b", "step")[0]
    assert "mfu" not in events(tmp_path / "c", "step")[0]


def test_utilisation_counts_what_the_layers_did_in_each_step(tmp_path):
    asked = []

    def half_at_first(step):
        asked.append(step)
        return Passage(0.5 if step < 10 else 1.0, 30.0)

    for folder, passage in [("a", half_at_first), ("b", lambda _: Passage(1.0, 30.0))]:
        run(monitor(tmp_path / folder, shape=SHAPE, device_name="NVIDIA H200", passage=passage), range(2, 21))
    assert asked == list(range(1, 20)), "steps done before each step"
    dropping, whole = ([e["mfu"] for e in events(tmp_path / f, "step")] for f in "ab")
    flops = [flops_per_token(SHAPE, mean_context=30.0, scored_share=0.15, layer_share=s) for s in (0.5, 1.0)]
    assert dropping[0] / whole[0] == pytest.approx(flops[0] / flops[1])
    assert dropping[1] == whole[1]


def test_a_peak_in_the_configuration_wins_over_the_table(tmp_path):
    for folder, peak in [("a", None), ("b", 989 * 2.0)]:
        run(monitor(tmp_path / folder, shape=SHAPE, device_name="NVIDIA H200", peak_tflops=peak), [1])
    table, configured = (events(tmp_path / f, "step")[0]["mfu"] for f in "ab")
    assert table == pytest.approx(2 * configured)


def test_cost_counts_all_devices_and_all_restarts(tmp_path):
    observer = monitor(tmp_path, gpu_hour_usd=3.0)
    observer.on_step(RunState(step=1, compute_seconds=7200.0), report(1))
    assert events(tmp_path, "step")[0]["cost_usd"] == pytest.approx(2 * 2 * 3.0)


def test_start_resume_evaluation_and_end_are_events(tmp_path):
    run(monitor(tmp_path), [1])
    observer = monitor(tmp_path, start_step=1)
    observer.evaluated(1, {"loss": 2.0})
    observer.event("saved", step=1, seconds=0.5)
    run(observer, [2])
    names = [e["event"] for e in read_events(tmp_path / "events.jsonl")]
    assert names == ["started", "step", "ended", "resumed", "evaluated", "saved", "ended"]
    assert events(tmp_path, "resumed")[0]["step"] == 1
    assert events(tmp_path, "evaluated")[0]["metrics"] == {"loss": 2.0}
    assert events(tmp_path, "ended")[-1]["step"] == 2


def board(folder):
    """What TensorBoard shows of a run."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def full_run(folder):
    """A run that writes all there is to write."""
    observer = monitor(folder, world=World(0, 2), tensorboard=True, shape=SHAPE, peak_tflops=100.0, gpu_hour_usd=2.0)
    observer.evaluated(5, {"loss": 2.0, "accuracy": 0.5, "unigram_accuracy": 0.1, "loss_web": 2.5, "f1": 0.5})
    observer.ranks(10, balance([{"data": 0.1, "compute": 0.4, "communication": 0.5}] * 2))
    run(observer, range(1, 11))
    return board(folder)


def test_tensorboard_shows_every_promised_curve(tmp_path):
    accumulator = full_run(tmp_path)
    parts = ("data", "forward_backward", "step", "save", "evaluate", "other")
    assert set(accumulator.Tags()["scalars"]) == {
        *(f"train/{n}" for n in ("loss", "accuracy", "learning_rate", "gradient_norm")),
        *(f"throughput/{n}" for n in ("tokens_per_second", "padding_percent", "mfu")),
        *(f"time/{n}_seconds" for n in parts),
        *(f"progress/{n}" for n in ("tokens", "rows", "epoch")),
        "cost/usd",
        "data/wait_share",
        *(f"health/{n}" for n in ("skipped_steps", "numbers_lost")),
        *(
            f"ranks/{n}"
            for n in ("slowest", "work_over_median", "data_excess", "communication_least", "communication_most")
        ),
        "ledger/total",
        "ledger/step",
        "goodput/ratio",
        *(f"goodput/{bucket}" for bucket in BUCKETS),
        *(f"evaluation/{n}" for n in ("loss", "accuracy", "unigram_accuracy", "loss_web", "f1")),
        *(f"hparam/{n}" for n in ("held_out_loss", "held_out_accuracy", "held_out_f1")),
        *(f"hparam/{n}" for n in ("tokens_per_second", "mfu", "cost_usd", "goodput")),
    }
    assert [e.step for e in accumulator.Scalars("train/loss")] == [1, 10]
    assert [e.value for e in accumulator.Scalars("data/wait_share")] == pytest.approx([0.1, 0.1])


def test_every_chart_of_the_layout_shows_a_curve_that_is_written(tmp_path):
    accumulator = full_run(tmp_path)
    written = accumulator.Tags()["scalars"]
    tensor = accumulator.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    assert [group.title for group in layout.category] == list(LAYOUT)
    assert {"Loss and accuracy", "Throughput and cost", "Health", "Data"} <= set(LAYOUT)
    for group in layout.category:
        for chart in group.chart:
            for pattern in chart.multiline.tag:
                assert any(re.fullmatch(pattern, tag) for tag in written), f"{group.title}, {chart.title}: {pattern}"


def charts(folder):
    tensor = board(folder).Tensors("custom_scalars__config__")[0].tensor_proto
    return {chart.title for g in layout_pb2.Layout.FromString(tensor.string_val[0]).category for chart in g.chart}


def test_a_chart_that_would_stay_empty_is_left_out(tmp_path):
    full_run(tmp_path / "full")
    run(monitor(tmp_path / "one", tensorboard=True, shape=SHAPE), range(1, 11))
    left_out = charts(tmp_path / "full") - charts(tmp_path / "one")
    every = {chart: curves for group in LAYOUT.values() for chart, curves in group.items()}
    assert charts(tmp_path / "full") == set(every)
    assert {curve.split("/")[0] for chart in left_out for curve in every[chart]} == {"cost", "throughput", "ranks"}
    assert {"cost, US dollars", "model FLOP utilisation", "number of the slowest rank"} <= left_out


def test_figures_of_a_run_are_those_of_its_whole_work(tmp_path):
    def last(tag):
        return board(tmp_path).Scalars(tag)[-1].value

    observer = monitor(tmp_path, tensorboard=True, shape=SHAPE, peak_tflops=1.0, gpu_hour_usd=2.0)
    observer.evaluated(0, {"loss": 4.0}, is_kept=False)
    observer.evaluated(5, {"loss": 2.0, "accuracy": 0.5})
    observer.evaluated(10, {"loss": 3.0, "accuracy": 0.6}, is_kept=False)
    state = run(observer, range(1, 26))
    assert [last(f"hparam/held_out_{name}") for name in ("loss", "accuracy")] == [2.0, 0.5]
    assert last("evaluation/loss") == 3.0
    assert last("hparam/tokens_per_second") == pytest.approx(state.tokens / state.compute_seconds)
    assert last("hparam/cost_usd") == pytest.approx(25 / 3600 * 2 * 2.0)
    assert last("hparam/mfu") == pytest.approx(events(tmp_path, "step")[-1]["mfu"], rel=1e-6)


def test_how_evenly_ranks_work_is_an_event_that_a_resume_takes_back(tmp_path):
    for step in (10, 20):
        monitor(tmp_path, start_step=step - 5).ranks(step, {"slowest": 3.0, "work_over_median": 1.5})
    monitor(tmp_path, start_step=15)
    current = current_curve(read_events(tmp_path / "events.jsonl"))
    assert [(e["step"], e["slowest"]) for e in current if e["event"] == "ranks"] == [(10, 3.0)]


def test_histograms_are_drawn_where_they_were_counted(tmp_path):
    observer = monitor(tmp_path, tensorboard=True)
    observer.histograms(7, {"weights/a": histogram_of(torch.tensor([-1.0, 0.5, 0.5])), "weights/b": EMPTY})
    run(observer, range(1, 11))
    accumulator = board(tmp_path)
    assert accumulator.Tags()["histograms"] == ["weights/a"]
    (event,) = accumulator.Histograms("weights/a")
    assert event.step == 7
    filled = {
        limit: count for limit, count in zip(event.histogram_value.bucket_limit, event.histogram_value.bucket) if count
    }
    assert filled == {-1.0: 1, 0.5: 2}
    assert event.histogram_value.sum == 0.0


def test_ranks_above_0_leave_no_trace(tmp_path):
    run(monitor(tmp_path / "run", world=World(rank=1, size=2), tensorboard=True), range(1, 11))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_deleted_under_the_run_stops_nothing(tmp_path):
    observer, state = monitor(tmp_path / "run", tensorboard=True, log_every=1), RunState()
    observer.on_step(state, report(1))
    (tmp_path / "run").rename(tmp_path / "gone")
    for step in (2, 3):
        observer.on_step(state, report(step))
    observer.on_end(state)
    assert [e["step"] for e in events(tmp_path / "run", "step")] == [2, 3]
    assert events(tmp_path / "run", "ended")[0]["events_dropped"] >= 1


def test_the_ledger_in_tensorboard_tells_two_runs_apart_and_is_whole_at_saves(tmp_path):
    first = monitor(tmp_path, log_every=1, tensorboard=True)
    state = RunState(step=3, rows=24, tokens=2700, ledger=2**62 + 2**23 + 5)
    first.on_step(state, report(3))
    first.saved(state, seconds=0.5, folder="step-00000003")
    first.on_end(state)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(e.step, int(e.value)) for e in accumulator.Scalars("ledger/total")] == [(3, 2**23 + 5)]
    assert [int(e.value) for e in accumulator.Scalars("ledger/step")] == [3]
    (text,) = accumulator.Tensors("ledger/text_summary")
    assert str(state.ledger).encode() in text.tensor_proto.string_val[0]
    (saved,) = events(tmp_path, "saved")
    assert int(saved["ledger"]) == state.ledger
    assert saved["folder"] == "step-00000003"


@pytest.mark.parametrize("bit", [0, 1, 12, 23])
def test_a_ledger_curve_keeps_every_one_of_its_bits_in_float32(bit):
    at = 2**62 + (2**24 - 1 - (1 << bit))
    assert int(np.float32(ledger_curves(total=at, of_step=at)["ledger/total"])) == at % 2**24


def test_the_end_says_where_the_wall_time_went_over_all_attempts(tmp_path, messages):
    run(monitor(tmp_path), range(1, 26))
    run(monitor(tmp_path, start_step=20, max_steps=30), range(21, 31))
    ended = events(tmp_path, "ended")[-1]["goodput"]
    assert (ended["attempts"], ended["replayed_steps"]) == (2, 5)
    assert ended["wall"] == pytest.approx(sum(ended[bucket] for bucket in BUCKETS), abs=0.02)
    assert any(line.startswith("goodput ") and "in 2 attempts, 5 steps done again" in line for line in messages)


def test_secrets_are_in_no_event_and_no_text(tmp_path):
    observer = monitor(tmp_path, tensorboard=True)
    observer.event("save_failed", error="https://anna:hunter2x@host/x refused", detail={"why": ["token=hunter2xyz"]})
    run(observer, [1])
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"hunter2x" not in written
    assert b"<redacted>@host/x refused" in written


def test_a_failure_of_the_monitor_itself_never_reaches_the_loop(tmp_path, messages):
    observer = monitor(tmp_path)
    observer.on_step(RunState(step=1), None)
    observer.evaluated(1, {"loss": "not a number"})
    observer.saved(None, seconds=1.0, folder="x")
    run(observer, [2])
    assert observer.failures == 3
    assert events(tmp_path, "ended")[0]["events_dropped"] == 3
    assert len([m for m in messages if "numbers of this run are being lost" in m]) == 1
