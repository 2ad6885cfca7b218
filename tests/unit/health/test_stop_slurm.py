import math
import os
import time

import pytest

from dstrain.health import stop_slurm
from dstrain.health.stop_slurm import ask_time_left, end_from_environment, job_id, parse_answer, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("59", 59), ("1:01", 61), ("2:00:03", 7203), ("1-02:03:04", 93784), ("0:00", 0), ("UNLIMITED", math.inf),
        ("INVALID", 0), ("NOT_SET", None), ("N/A", None), ("", None), ("soon", None), ("1-2-3", None), ("-5", None),
    ],
)  # fmt: skip
def test_durations_as_slurm_writes_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("1600000100|5:00", 100.0),  # a preemption has moved the end
        ("1600000900|5:00", 300.0),
        ("N/A|UNLIMITED", math.inf),
        ("1600000100|UNLIMITED", 100.0),
        ("NONE|10", 10.0),
        ("1599999000|INVALID", 0.0),
        ("N/A|NOT_SET", None),
        ("slurm_load_jobs error: Invalid job id specified", None),
        ("", None),
        ("0|", None),
    ],
)
def test_the_shorter_of_end_and_time_left_counts(line, left):
    assert parse_answer(line, now=1.6e9) == left


def test_a_controller_that_writes_local_time_is_understood(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1.6e9 + 250))
        assert parse_answer(f"{end}|NOT_SET", now=1.6e9) == 250.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_environment_is_the_fallback():
    assert end_from_environment({}, now=1.6e9) is None
    assert end_from_environment({"SLURM_JOB_END_TIME": "1600000060"}, now=1.6e9) == 60.0
    assert end_from_environment({"SLURM_JOB_END_TIME": "1599999999"}, now=1.6e9) == 0.0
    assert end_from_environment({"SLURM_JOB_END_TIME": "never"}, now=1.6e9) is None


def test_only_a_number_is_a_job():
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "4711"}) == "4711"
    assert job_id({"SLURM_JOB_ID": "4711; rm -rf ~"}) is None


def fake_squeue(folder, body):
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_squeue_is_asked_for_this_job_in_seconds_of_the_epoch(tmp_path, monkeypatch):
    fake_squeue(tmp_path, f'echo "$SLURM_TIME_FORMAT $@" > {tmp_path}/asked; echo "N/A|1:00"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert ask_time_left("4711") == 60.0
    assert (tmp_path / "asked").read_text() == "%s --noheader --jobs=4711 --format=%e|%L\n"


@pytest.mark.parametrize("body", ["exit 1", "echo 'N/A|1:00'; exit 1", "true", "echo nonsense", "printf '\\377'"])
def test_a_controller_that_does_not_know_says_nothing(tmp_path, monkeypatch, body):
    fake_squeue(tmp_path, body)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert ask_time_left("4711") is None


def test_a_controller_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    fake_squeue(tmp_path, "exec sleep 600")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(stop_slurm, "TIMEOUT_S", 0.2)
    assert ask_time_left("4711") is None


def test_without_squeue_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_time_left("4711") is None
