"""Estimated saves and failures go through the formulas of the run."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.checkpoint.interval import daly, goodput
from dstrain.planner.reliability import Reliability, reliability
from tests.support.published_runs import model


def found(**changes: Any) -> Reliability:
    settings: dict[str, Any] = {
        "ranks": 64, "is_gpu": True, "device_hours_per_failure": 50_000.0, "restart_s": 300.0, "storage_bytes_s": 2e9,
        "longest_s": 1e9,
    }  # fmt: skip
    return reliability(model("BERT-large"), **{**settings, **changes})


def test_interval_and_goodput_are_those_of_the_checkpoint_room() -> None:
    safe = found()
    assert safe.mean_failure_s == pytest.approx(3600 * 50_000 / 64)
    assert safe.checkpoint_bytes == 12 * model("BERT-large").parameters
    assert safe.interval_s == pytest.approx(daly(safe.save_s, safe.mean_failure_s))
    assert safe.goodput == goodput(
        safe.interval_s, cost_s=safe.save_s, mean_failure_s=safe.mean_failure_s, restart_s=300.0
    )


def test_no_save_begins_before_the_last_is_durable() -> None:
    assert found(storage_bytes_s=1e6, ranks=4096).interval_s >= found(storage_bytes_s=1e6).durable_s


def test_the_cap_holds() -> None:
    assert found(longest_s=120.0).interval_s == pytest.approx(120.0)


def test_more_devices_fail_more_often_and_save_faster() -> None:
    few, many = found(ranks=8), found(ranks=8192)
    assert many.mean_failure_s < few.mean_failure_s
    assert many.save_s < few.save_s
    assert many.goodput < few.goodput
