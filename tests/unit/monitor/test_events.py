import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.base.world import World
from dstrain.monitor.events import EventLog, current_curve, read_events


def test_events_come_back_in_order_with_name_and_time(tmp_path):
    log = EventLog(tmp_path / "run" / "events.jsonl", World())
    log.write("started", step=0)
    log.write("step", step=1, loss=2.5)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [(e["event"], e["step"]) for e in events] == [("started", 0), ("step", 1)]
    assert events[0]["time"] <= events[1]["time"]


def test_other_ranks_write_nothing(tmp_path):
    EventLog(tmp_path / "events.jsonl", World(rank=1, size=2)).write("step", step=1)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_second_process_appends(tmp_path):
    for step in (1, 2):
        log = EventLog(tmp_path / "events.jsonl", World())
        log.write("step", step=step)
        log.close()
    assert [e["step"] for e in read_events(tmp_path / "events.jsonl")] == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stay_strict_json_and_readable(tmp_path, value):
    EventLog(tmp_path / "events.jsonl", World()).write("step", gradient_norm=value, nested={"a": [value]})
    line = (tmp_path / "events.jsonl").read_text()
    event = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert str(float(event["gradient_norm"])) == str(value)
    assert event["nested"]["a"] == [event["gradient_norm"]]


def test_numpy_numbers_become_plain_numbers(tmp_path):
    EventLog(tmp_path / "events.jsonl", World()).write(
        "step", loss=np.float32(0.5), rows=np.int64(7), many=np.arange(2)
    )
    event = read_events(tmp_path / "events.jsonl")[0]
    assert (event["loss"], event["rows"], event["many"]) == (0.5, 7, [0, 1])


def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next_event(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n{"event": "step", "st')
    assert [e["step"] for e in read_events(path)] == [1]
    EventLog(path, World()).write("resumed", step=1)
    assert [e["event"] for e in read_events(path)] == ["step", "resumed"]


def test_reading_a_missing_log_names_it(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_events(tmp_path / "nowhere.jsonl")


def test_a_deleted_log_is_started_again(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    log = EventLog(path, World())
    log.write("step", step=1)
    shutil.rmtree(tmp_path / "run")
    log.write("step", step=2)
    assert [e["step"] for e in read_events(path)] == [2]


def test_an_unwritable_place_drops_and_counts_and_warns_once(tmp_path, messages):
    (tmp_path / "run").write_text("a file where the folder should be")
    log = EventLog(tmp_path / "run" / "events.jsonl", World())
    log.write("step", step=1)
    log.write("step", step=2)
    assert log.dropped == 2
    assert len([m for m in messages if "events are being lost" in m]) == 1


def test_a_full_disk_tears_one_line_and_the_log_recovers(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, World())
    log.write("step", step=1)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a file size limit makes write() come up short, then fail, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 10, old_limit[1]))
        log.write("step", step=2)
        log.write("step", step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    log.write("step", step=4)
    assert log.dropped == 2
    assert [e["step"] for e in read_events(path)] == [1, 4]


def steps(*numbers):
    return [{"event": "step", "step": n} for n in numbers]


def test_points_after_the_resumed_step_are_taken_back():
    events = [*steps(48, 49, 50, 51), {"event": "saved", "step": 50}, {"event": "resumed", "step": 49}, *steps(50, 51)]
    assert [e["step"] for e in current_curve(events) if e["event"] == "step"] == [48, 49, 50, 51]
    assert [e["event"] for e in current_curve(events)].index("resumed") == 3


def test_events_that_are_no_curve_points_stay():
    events = [{"event": "saved", "step": 60}, {"event": "resumed", "step": 50}]
    assert current_curve(events) == events


def test_starting_afresh_takes_everything_back():
    events = [{"event": "evaluated", "step": 0}, *steps(1, 2), {"event": "started", "step": 0}, *steps(1)]
    assert [e["event"] for e in current_curve(events)] == ["started", "step"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=6))
def test_any_history_of_crashes_leaves_every_step_once_and_in_order(lives):
    """Each life resumes at or before the step its forerunner reached and dies some steps later."""
    events, reached = [], 0
    for number, (back, length) in enumerate(lives):
        start = max(0, reached - back)
        if number:
            events.append({"event": "resumed", "step": start})
        events += [{"event": "step", "step": n, "life": number} for n in range(start + 1, start + length + 1)]
        reached = start + length
    points = [e for e in current_curve(events) if e["event"] == "step"]
    assert [e["step"] for e in points] == list(range(1, reached + 1))
    lives_of = [e["life"] for e in points]
    assert lives_of == sorted(lives_of)
