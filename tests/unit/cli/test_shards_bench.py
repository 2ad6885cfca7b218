"""`dstrain shards bench` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.cli.main import main

SMALL = ("--sequence-length", "48", "--global-batch", "16", "--micro-batch", "4", "--seconds", "0.05")


def test_a_bench_prints_parts_forecast_and_advice(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "bench", str(shards), *SMALL, "--gpu", "h100", "--gpus-per-node", "2"]) == 0
    said = capsys.readouterr().out
    for word in ("first batch", "steady", "masking", "storage", "padding", "seek", "memory", "an estimate", "forecast"):
        assert word in said
    assert "advice       padding is" in said


def test_json_has_the_same_numbers_for_programs(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "bench", str(shards), *SMALL, "--need-mtok-s", "0.5", "--json", "data.window_rows=64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["need"]["mtok_s"] == 0.5
    assert found["forecast"]["cores_per_gpu"] > 0
    assert found["measured"]["steady_mtok_s_per_core"] > 0
    assert found["advice"]


def test_without_a_need_there_is_no_forecast(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "bench", str(shards), *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "rtx"), "not in the table"),
        (("--gpu", "h100", "--need-mtok-s", "1"), "not both"),
        (("--need-mtok-s", "-1"), "--need-mtok-s"),
        (("--threads", "0"), "--threads"),
        (("--seconds", "0"), "--seconds: must be above 0"),
        (("--global-batch", "100000"), "global_batch"),
        (("data.nonsense=1",), "nonsense"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    shards: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["shards", "bench", str(shards), *SMALL, *options]) == 78
    assert message in capsys.readouterr().err


def test_a_folder_without_shards_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "bench", str(tmp_path / "none"), *SMALL]) == 78
    assert "no such folder" in capsys.readouterr().err
    assert main(["shards", "bench", str(tmp_path), *SMALL]) == 78
    assert "not a shards folder" in capsys.readouterr().err
